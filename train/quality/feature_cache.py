"""Features on disk, by the bytes of their images: blocks of images in safetensors files, with a checksum each."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from loguru import logger
from safetensors import SafetensorError, numpy

from sdxl_trainer.data.files import read_regular, remove_leftovers, write_atomic

DIGESTS, FEATURES, CHECKSUM = "images", "features", "checksum"
DIGEST_BYTES = 32
MAX_BLOCK_BYTES = 1 << 28


def hash_images(files: Iterable[Path]) -> dict[Path, bytes]:
    """Return the SHA-256 of each image file."""
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in files}


def write_block(folder: Path, features: Mapping[bytes, np.ndarray]) -> None:
    """Write the features of images, [D] float32 by the SHA-256 of each image, as a file of their own."""
    digests = np.frombuffer(b"".join(features), np.uint8).reshape(-1, DIGEST_BYTES)
    values = np.stack(list(features.values())).astype(np.float32)
    checksum = np.frombuffer(_checksum(digests, values), np.uint8)
    name = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    content = numpy.save({DIGESTS: digests, FEATURES: values, CHECKSUM: checksum})
    write_atomic(folder / f"{name}.safetensors", content)


def read_blocks(folder: Path) -> dict[bytes, np.ndarray]:
    """Read all features of a folder, [D] float32 by the SHA-256 of each image. Damaged files are left out."""
    remove_leftovers(folder)
    found: dict[bytes, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            block = numpy.load(read_regular(file, MAX_BLOCK_BYTES).content)
            digests, values, checksum = block[DIGESTS], block[FEATURES], block[CHECKSUM]
            if checksum.tobytes() != _checksum(digests, values):
                raise ValueError("its checksum is wrong")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            logger.warning("{} is damaged, its features are computed again: {}", file, error)
            continue
        found |= {digest.tobytes(): row for digest, row in zip(digests, values, strict=True)}
    return found


def _checksum(digests: np.ndarray, values: np.ndarray) -> bytes:
    return hashlib.sha256(digests.tobytes() + values.tobytes()).digest()
