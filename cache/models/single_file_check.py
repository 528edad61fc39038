"""Header checks of safetensors files: recognise SDXL base models, and describe other kinds of file.

These checks run before anything large is loaded, and need neither torch nor the safetensors library.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer import configs as configs_package
from sdxl_trainer.cache.models.single_file_names import (
    COMPONENT_PREFIXES,
    Shape,
    TableRow,
    TextProjection,
    build_name_table,
)

SDXL_CONFIG_FOLDER = Path(configs_package.__file__).parent / "sdxl"
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# Other tools add these tensors, which no diffusers model holds: position_ids is arange(77), and SDXL does not use a
# projection of encoder 1.
_IGNORED_FILE_NAMES = frozenset(
    COMPONENT_PREFIXES[component] + name
    for component, name in (
        ("text_encoder", "text_model.embeddings.position_ids"),
        ("text_encoder", "text_projection.weight"),
        ("text_encoder_2", "transformer.text_model.embeddings.position_ids"),
    )
)


# Beginning of a file that is not safetensors → what it is, and what to do. `{path}` and `{target}` are file names.
FOREIGN_CONTENTS: tuple[tuple[bytes, str, str], ...] = (
    (b"<", "is a web page, not a model", "download the file itself: on Hugging Face, /resolve/ in place of /blob/"),
    (b"{", "is a text (JSON), not a model", "open it: it may hold the error of a download; download the file again"),
    (b"version https://git-lfs", "is a pointer of Git LFS, not a model", "run git lfs pull in its folder"),
    (b"PK\x03\x04", "is a pickled checkpoint (.ckpt)", "convert it: python train/convert.py {path} {target}"),
    (b"\x80", "is a pickled checkpoint (.ckpt)", "convert it: python train/convert.py {path} {target}"),
    (b"GGUF", "is a quantised model (GGUF)", "give the .safetensors file that it was made from"),
)
CURE_DOWNLOAD = "download or copy it again"


class NotSafetensorsError(ValueError):
    """A file that is not a whole safetensors file. The message is the reason, `cure` what to do."""

    def __init__(self, reason: str, cure: str = CURE_DOWNLOAD):
        self.cure = cure
        super().__init__(reason)


@dataclass(frozen=True)
class SafetensorsHeader:
    """Header of a safetensors file: types and shapes of its tensors by name, and its metadata."""

    types: dict[str, str]
    shapes: dict[str, Shape]
    metadata: dict[str, str]
    data_start: int  # bytes from the start of the file to the first tensor


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file without reading its tensors.

    Raises:
        OSError: the file cannot be opened.
        NotSafetensorsError: the file is not a safetensors file, is cut short, or holds data that its header does not
            describe.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            file.seek(0)
            raise explain_foreign_content(path, file.read(64), size)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = dict(entries.pop("__metadata__", None) or {})
        types = {name: str(entry["dtype"]) for name, entry in entries.items()}
        shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in entries.items()}
        spans = {
            name: (int(begin), int(end)) for name, entry in entries.items() for begin, end in [entry["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise NotSafetensorsError(f"{path} is not a safetensors file: its header cannot be read ({error})") from error
    data_bytes = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if types[name] not in ITEM_BYTES:
            cure = "give a model whose weights are fp32, fp16 or bf16"
            raise NotSafetensorsError(f"{path}: tensor {name} has the unknown type {types[name]}", cure)
        if begin != data_bytes or end - begin != math.prod(shapes[name]) * ITEM_BYTES[types[name]]:
            raise NotSafetensorsError(f"{path} is damaged: offsets and shape of {name} do not match")
        data_bytes = end
    described = 8 + length + data_bytes
    if size != described:
        raise NotSafetensorsError(f"{path} is damaged: its header describes {described} bytes, the file has {size}")
    return SafetensorsHeader(types=types, shapes=shapes, metadata=metadata, data_start=8 + length)


def explain_foreign_content(path: Path, head: bytes, size: int) -> NotSafetensorsError:
    """Return the error for a file that is not safetensors, by its first bytes."""
    if not size:
        return NotSafetensorsError(f"{path} is empty")
    for mark, what, cure in FOREIGN_CONTENTS:
        if head.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(mark):
            return NotSafetensorsError(
                f"{path} {what}", cure.format(path=path, target=path.with_suffix(".safetensors"))
            )
    return NotSafetensorsError(f"{path} is not a safetensors file or is cut short: it has {size} bytes")


def load_component_configs(folder: str | os.PathLike[str] = SDXL_CONFIG_FOLDER) -> dict[str, dict[str, Any]]:
    """Load the configs of the four components from a diffusers folder, by default those of SDXL base 1.0.

    Raises:
        ValueError: a file is not a JSON object.
    """
    return {component: read_component_config(folder, component) for component in COMPONENT_PREFIXES}


def read_component_config(folder: str | os.PathLike[str], component: str) -> dict[str, Any]:
    """Read the `config.json` of one component of a diffusers folder.

    Raises:
        ValueError: the file is not a JSON object.
    """
    return read_json_object(Path(folder) / component / "config.json")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: the file is not a JSON object.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def find_single_file_problems(
    path: str | os.PathLike[str],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    text_projection: TextProjection = "correct",
) -> list[str]:
    """List the reasons why a file is not an SDXL base model, from its header; an empty list if it is one.

    Args:
        configs: config of each component to check, by default those of SDXL base 1.0.
    """
    try:
        header = read_safetensors_header(path)
    except FileNotFoundError:
        return [f"{path} does not exist"]
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = []
    for component, config in (load_component_configs() if configs is None else configs).items():
        try:
            config = fit_unet_config(config, header.shapes) if component == "unet" else config
            problems += find_component_problems(header, component, build_name_table(component, config, text_projection))
        except ValueError as error:
            problems.append(str(error))
    foreign = guess_foreign_format(header.shapes) if problems else None
    return [f"it looks like {foreign}", *problems] if foreign else problems


def fit_unet_config(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the config of a single file's U-Net, with the number of channels that the file's tensors have.

    A file whose input and output differ, such as an inpainting model, keeps the config's number, which the checks
    then find its shapes to contradict.

    Args:
        shapes: of the file's tensors, by name.
    """
    prefix = COMPONENT_PREFIXES["unet"]
    in_channels = shapes.get(f"{prefix}input_blocks.0.0.weight", ())[1:2]
    out_channels = shapes.get(f"{prefix}out.2.weight", ())[:1]
    if not in_channels or in_channels != out_channels:
        return dict(config)
    return {**config, "in_channels": in_channels[0], "out_channels": out_channels[0]}


def find_component_problems(header: SafetensorsHeader, component: str, rows: Sequence[TableRow]) -> list[str]:
    """List the faults of one component: tensors that are missing, unknown, or of a wrong shape or type."""
    prefix = COMPONENT_PREFIXES[component]
    if not any(name.startswith(prefix) for name in header.shapes):
        return [f"{component}: none of its tensors (no name begins with {prefix})"]
    wanted = {row.file_name: row for row in rows}
    known = wanted.keys() | _IGNORED_FILE_NAMES
    present = [(name, row) for name, row in wanted.items() if name in header.shapes]
    missing = [name for name, row in wanted.items() if name not in header.shapes and not row.carried]
    unknown = [name for name in header.shapes if name.startswith(prefix) and name not in known]
    shapes = [
        f"{name} is {list(header.shapes[name])}, not {list(row.file_shape)}"
        for name, row in present
        if not _same_shape(header.shapes[name], row.file_shape)
    ]
    types = [f"{name} is {header.types[name]}" for name, _ in present if header.types[name] not in _FLOAT_TYPES]
    # Whole sentences, so that each can be translated.
    faults = {
        f"{component}: {len(missing)} of {len(wanted)} names missing ({_list_first(missing)})": missing,
        f"{component}: {len(unknown)} unknown names ({_list_first(unknown)})": unknown,
        f"{component}: {len(shapes)} tensors with another shape ({_list_first(shapes)})": shapes,
        f"{component}: {len(types)} tensors with a type that cannot be trained ({_list_first(types)})": types,
    }
    return [fault for fault, items in faults.items() if items]


def _list_first(items: Sequence[str]) -> str:
    return "; ".join([*items[:3], *(["…"] if len(items) > 3 else [])])


def _same_shape(left: Shape, right: Shape) -> bool:
    """Return whether shapes are equal up to trailing ones; some tools store a 1×1 convolution as a matrix."""
    length = max(len(left), len(right))
    return left + (1,) * (length - len(left)) == right + (1,) * (length - len(right))


def has_all_components(shapes: Mapping[str, Shape]) -> bool:
    """Return whether a file holds tensors of all four networks, by SDXL's names, whatever their shapes are."""
    return all(any(name.startswith(prefix) for name in shapes) for prefix in COMPONENT_PREFIXES.values())


def guess_foreign_format(shapes: Mapping[str, Shape]) -> str | None:
    """Describe a file of another kind, with what to do; None if its kind is not recognised."""
    return next((description for description, test in _FOREIGN_FORMATS.items() if test(shapes)), None)


def _has(*fragments: str) -> Callable[[Mapping[str, Shape]], bool]:
    return lambda shapes: any(fragment in name for name in shapes for fragment in fragments)


def _has_context(width: int) -> Callable[[Mapping[str, Shape]], bool]:
    """Build a test for a U-Net in LDM names whose text states have this width. Text encoders are not needed."""
    return lambda shapes: any(
        name.startswith(COMPONENT_PREFIXES["unet"]) and name.endswith("attn2.to_k.weight") and shape[-1:] == (width,)
        for name, shape in shapes.items()
    )


def _has_inputs(channels: int) -> Callable[[Mapping[str, Shape]], bool]:
    name = COMPONENT_PREFIXES["unet"] + "input_blocks.0.0.weight"
    return lambda shapes: shapes.get(name, ())[1:2] == (channels,)


def _any_of(*tests: Callable[[Mapping[str, Shape]], bool]) -> Callable[[Mapping[str, Shape]], bool]:
    return lambda shapes: any(test(shapes) for test in tests)


# The order matters: an adapter or another family may hold names that a later test would match too.
_FOREIGN_FORMATS: dict[str, Callable[[Mapping[str, Shape]], bool]] = {
    "a LoRA, which is not a whole model: merge it into a base model first": _has(
        "lora_unet", "lora_te", ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w1"
    ),
    "a ControlNet, not a base model": _has("control_model.", "controlnet_"),
    "a Flux model": _has("double_blocks.0."),
    "an SD3 model": _has("joint_blocks.0."),
    "an SD1.5 model": _any_of(_has("cond_stage_model.transformer."), _has_context(768)),
    "an SD2 model": _any_of(_has("cond_stage_model.model."), _has_context(1024)),
    "an SDXL refiner: this project trains the base model": _any_of(
        _has("conditioner.embedders.0.model."), _has_context(1280)
    ),
    "an inpainting SDXL U-Net (9 input channels): this project trains the base model (4)": _has_inputs(9),
    "an instruct-pix2pix SDXL U-Net (8 input channels): this project trains the base model (4)": _has_inputs(8),
    "weights in diffusers names: give the folder that holds model_index.json instead of a file": _has(
        "down_blocks.0.resnets.0."
    ),
}
