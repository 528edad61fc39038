"""Print requirements.txt, which holds the dependencies of pyproject.toml: `python tests/requirements.py`."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Dependencies of sdxl-trainer, for tools that expect this file. Generated from pyproject.toml by
#   python tests/requirements.py > requirements.txt
# Add `-c constraints.txt` for the versions that were tested together, and `pip install --no-deps -e .` for the program.
# On a machine without GPU, first: pip install torch --index-url https://download.pytorch.org/whl/cpu
"""


def build_requirements() -> str:
    """Return the content of requirements.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return HEAD + "".join(f"{line}\n" for line in project["dependencies"])


if __name__ == "__main__":
    sys.stdout.write(build_requirements())
