"""Packaging: each top-level folder is one sub-package of `sdxl_trainer`; everything else is in pyproject.toml.

The folders lie at the top of the checkout because users start them by path (`torchrun train/main.py`). The mapping
below gives them one import name from anywhere. Install with `pip install -e .`. `.types/` holds the same mapping as
links, for pyright and editors, which cannot follow `package_dir`.
"""

import ast
from pathlib import Path

from setuptools import setup

FOLDERS = ("configs", "launch", "data", "cache", "train")


def list_packages() -> list[str]:
    """Return the import names of all folders and rooms."""
    rooms = sorted(file.parent.as_posix() for folder in FOLDERS for file in Path(folder).rglob("__init__.py"))
    return ["sdxl_trainer", *(f"sdxl_trainer.{room.replace('/', '.')}" for room in rooms)]


def read_version() -> str:
    """Return `__version__` of the package without importing it."""
    for node in ast.parse(Path(".package/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            return ast.literal_eval(node.value)
    raise ValueError(".package/__init__.py holds no __version__")


setup(
    version=read_version(),
    packages=list_packages(),
    package_dir={"sdxl_trainer": ".package", **{f"sdxl_trainer.{folder}": folder for folder in FOLDERS}},
    package_data={
        "sdxl_trainer": ["py.typed"],
        "sdxl_trainer.configs": ["*.yaml", "**/*.po", "**/*.json", "**/*.txt", "**/*.safetensors"],
        "sdxl_trainer.launch": ["*.sh", "*.sbatch"],
        "sdxl_trainer.cache.preview": ["*.html"],
        "sdxl_trainer.train.report": ["*.html", "*.css"],
        "sdxl_trainer.train.evidence": ["*.html"],
        "sdxl_trainer.train.watch": ["page/*"],
    },
    # They install into a checkout and test it.
    exclude_package_data={"sdxl_trainer.launch": ["quickstart.sh", "environment.sh", "test.sh"]},
)
