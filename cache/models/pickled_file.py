"""Conversion of pickled checkpoints (.ckpt, .pt, .bin) to safetensors, without running the code that they may hold."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdxl_trainer.configs.problems import Problem, UserInputError
from sdxl_trainer.data.files import commit_file, open_temporary, usual_mode

PICKLE_MARKS = tuple(b"\x80" + bytes([version]) for version in range(2, 6))


def is_pickled_file(path: Path) -> bool:
    """Return whether a file is a checkpoint that `torch.save` has written."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(8)
    # The length of a safetensors header may begin like a pickle, but ends in zeros.
    return zipfile.is_zipfile(path) or (head[:2] in PICKLE_MARKS and head[5:] != bytes(3))


def convert_pickled_file(source: Path, target: Path) -> int:
    """Write the tensors of a pickled checkpoint as a safetensors file, under their names, and return their number.

    Only tensors and plain values are loaded (PyTorch's `weights_only`), so a malicious file can run nothing.

    Raises:
        UserInputError: the target has another suffix, or the checkpoint holds something else than tensors.
    """
    if target.suffix != ".safetensors":
        rule = "must end in .safetensors, because the source is a pickled checkpoint"
        raise UserInputError([Problem("target", target, rule, "convert it to one file first, and then that file")])
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "download it again, or look for a .safetensors file of this model"
        raise UserInputError([Problem("source", source, f"cannot be loaded safely: {reason}", cure)]) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserInputError([Problem("source", source, "holds no named tensors", "give the checkpoint of a model")])
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_temporary(target) as file:
        # Copies: safetensors refuses tensors that share memory.
        with usual_mode(Path(file.name)) as path:
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        commit_file(Path(file.name), target)
    return len(tensors)
