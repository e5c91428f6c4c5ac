"""Which files of a folder hold its weights: the choice is transformers' own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import InputError
from pipeline.json_file import json_field, parse_json, read_json_object
from pipeline.progress import note

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# What tools store beside codes, or in their place, by how the names end.
_TOOLS = {
    "compressed-tensors (llm-compressor) or ModelOpt": (
        r"\.weight_scale(_2)?$|\.weight_packed$|\.weight_zero_point$|\.weight_shape$"
        r"|\.weight_global_scale$|\.(input|output|k|v)_scale$"
    ),
    "block-wise float8 (DeepSeek's kind)": r"\.weight_scale_inv$",
    "GPTQ or AWQ": r"\.qweight$|\.qzeros$|\.g_idx$|\.scales_and_zeros$",
    "bitsandbytes": r"\.SCB$|\.absmax$|\.quant_map$|\.nested_(absmax|quant_map)$|\.quant_state\.",
    "MXFP4": r"_blocks$|_proj_scales$",
    "HQQ": r"\.W_q$",
    "Quanto": r"\.weight\._(data|scale|shift)$",
    "MLX, GPTQ or AWQ": r"\.scales$|\.zeros$",
    "torchao": r"\.weight:_|\.weight\.(int_data|tensor_impl)",
}
_CODES = re.compile(r"weight|_proj$|_blocks$|^W_q$")
# Of the length of the header, with which a file begins.
_LENGTH_BYTES = 8
_NUMBERS = ("F64", "F32", "F16", "BF16")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: what config.json names, else one file, else shards.

    Raises:
        InputError: none there, only pickles there, or the index names files that are not there.
    """
    chosen = _SINGLE
    if (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json")
        chosen = json_field(config, "transformers_weights", str, folder, default=None) or chosen
    if chosen == _SINGLE and not (folder / _SINGLE).is_file():
        chosen = _INDEX
    if Path(chosen).name != chosen or not (folder / chosen).is_file():
        raise _no_weights(folder, chosen)
    if not chosen.endswith(".json"):
        return [folder / chosen]
    files = _shards(folder, chosen)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            "Weight files that the index names are missing.",
            where=folder / chosen,
            observed=", ".join(missing[:4]),
            change="download or copy the whole folder again",
        )
    return files


def _shards(folder: Path, index: str) -> list[Path]:
    """The files of an index, each once."""
    path = folder / index
    places = json_field(read_json_object(path), "weight_map", dict, path)
    names = sorted({str(name) for name in places.values()})
    if not names or any(Path(name).name != name for name in names):
        raise InputError(
            "The index of the weights names no files beside it.",
            where=path,
            observed=", ".join(names[:4]) or "no names",
        )
    return [folder / name for name in names]


def _no_weights(folder: Path, chosen: str) -> InputError:
    """Why a folder has nothing to be read, with what lies there instead."""
    there = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if there and chosen == _INDEX:
        return InputError(
            "The folder's safetensors are not a model's: no index says how they belong together.",
            where=folder,
            observed=", ".join(path.name for path in there[:4]),
            expected=f"{_SINGLE}, or {_INDEX} and the files it names",
            change="download or copy the whole folder again",
        )
    return InputError(
        "The folder has no safetensors weights."
        + (" Pickled weights can run code and are refused." if pickles else ""),
        where=folder,
        observed=", ".join(pickles) or "no weight file",
        expected="*.safetensors",
        change="save the model again with save_pretrained(..., safe_serialization=True)",
    )


def check_weight_files(folder: Path, *, packed: bool = False) -> set[str]:
    """Open the header of every weight file, and name in a note the files that are left out.

    Args:
        folder: a model's.
        packed: its config says how codes are stored, so that they may be there.

    Returns:
        The names of all tensors.

    Raises:
        InputError: as `weight_files`; a file is broken; or it holds another tool's codes.
    """
    files = weight_files(folder)
    stored: dict[str, str] = {}
    for file in files:
        stored |= {name: kind for name, (kind, _) in read_header(file).items()}
    if not packed:
        _refuse_codes(folder, stored)
    left_out = sorted(
        {path.name for path in folder.glob("*.safetensors")} - {f.name for f in files}
    )
    if left_out:
        note(f"not read, as transformers would not read them: {', '.join(left_out)} in {folder}")
    return set(stored)


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> its type, as safetensors spells it, and its shape.

    Raises:
        InputError: the file is truncated, broken, or may not be read.
    """
    try:
        file.open("rb").close()  # the library says of a file without permission that it is missing
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            parts = {name: tensors.get_slice(name) for name in names}
            return {n: (p.get_dtype(), tuple(p.get_shape())) for n, p in parts.items()}
    except PermissionError as error:
        raise InputError(
            "A weight file cannot be read.",
            where=file,
            observed=error.strerror,
            change="check its permissions, and those of its folder",
        ) from error
    except (SafetensorError, OSError) as error:
        raise InputError(
            "A weight file is truncated or broken.",
            where=file,
            observed=f"{error} ({file.stat().st_size if file.exists() else 0} bytes)",
            change="download or copy the file again",
        ) from error


def stored_places(file: Path) -> dict[str, tuple[int, int]]:
    """Tensor name -> its first byte in a file, and that behind its last.

    Raises:
        InputError: as `read_header`, which the file has to pass first.
    """
    read_header(file)
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        header = parse_json(opened.read(size).decode("utf-8"), file)
    begin = _LENGTH_BYTES + size
    return {
        name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def quantising_tool(names: Any) -> str | None:
    """The tool whose kind of tensors is among the names."""
    for tool, pattern in _TOOLS.items():
        if any(re.search(pattern, str(name)) for name in names):
            return tool
    return None


def _refuse_codes(folder: Path, stored: dict[str, str]) -> None:
    """Raise InputError where weights are no plain numbers: float8, or codes packed in integers."""
    codes = [
        name
        for name, kind in stored.items()
        if kind not in _NUMBERS and (kind.startswith("F") or _CODES.search(name.rpartition(".")[2]))
    ]
    if codes:
        raise quantised_elsewhere(folder, codes, stored, f" ({stored[codes[0]]})")


def quantised_elsewhere(where: object, found: list[str], names: Any, kind: str = "") -> InputError:
    """The refusal of tensors in another tool's format, which the config says nothing of.

    Args:
        where: folder or file.
        found: tensors that show it.
        names: of all tensors, among which the tool is looked for.
        kind: said behind the first of them.
    """
    tool = quantising_tool([*found, *names]) or "an unknown tool"
    return InputError(
        "The weights are quantised already, by another tool.",
        where=where,
        observed=f"{len(found)} tensors such as {sorted(found)[0]}{kind}, the kind of {tool}",
        expected="weights in float32, float16 or bfloat16",
        change="start from the original weights",
    )
