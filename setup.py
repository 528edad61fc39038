"""Packaging: each top-level folder is one sub-package of `sdxl_trainer`.

The folders lie at the top of the checkout because users start them by path (`torchrun train/main.py`); the mapping
below gives them one import name from anywhere. The documented install is `pip install -e .`.
"""

from setuptools import setup

FOLDERS = ("configs", "launch", "data", "cache", "train")

setup(
    name="sdxl-trainer",
    version="0.1.0",
    description="Full fine-tuning of Stable Diffusion XL from 10 thousand to 100 million images",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[f"sdxl_trainer.{folder}" for folder in FOLDERS],
    package_dir={f"sdxl_trainer.{folder}": folder for folder in FOLDERS},
    package_data={
        "sdxl_trainer.configs": ["*.yaml", "**/*.json", "**/*.txt", "**/*.safetensors"],
        "sdxl_trainer.launch": ["*.sh", "*.sbatch"],
        "sdxl_trainer.train": ["*.html"],
    },
    install_requires=[
        "torch>=2.4",
        "deepspeed>=0.19",
        "diffusers>=0.36",
        "transformers>=5.0",
        "safetensors>=0.5",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=10",
        "loguru>=0.7",
        "webdataset>=1.0",
        "pydantic>=2.10",
        "pyarrow>=15",
        "orjson>=3.10",
        "msgspec>=0.18",
        "isal>=1.6",
        "imagecodecs>=2024.6",
        "simplejpeg>=1.8",
        "rich>=13",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "fsspec>=2024.6",
        "packaging>=23",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        "bitsandbytes": ["bitsandbytes>=0.45"],
        "optimizers": ["torch-optimi>=0.3.2", "prodigyopt>=1.1.2"],
        "lora": ["peft>=0.13"],
        "wandb": ["wandb>=0.19"],
        "xformers": ["xformers"],
        "s3": ["s3fs>=2024.6"],
        "gcs": ["gcsfs>=2024.6"],
        "http": ["aiohttp>=3.9"],
        "test": [
            "torch-optimi>=0.3.2",
            "prodigyopt>=1.1.2",
            "peft>=0.13",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "pyright[nodejs]>=1.1.390",
            "s3fs>=2024.6",
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=4",
        ],
    },
)
