"""One look at a model's folder before any work: what no verb takes is refused here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.json_file import read_json_object
from pipeline.model.weight_files import check_weight_files
from pipeline.tokenizer_files import require_small_tokenizer

# The quant_method of skipcat's own checkpoints.
_OWN = "skipcat"
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
_MOST_LAYERS_PER_TENSOR = 10  # some models use a layer more than once
_CODE_FIELDS = (
    "attn_implementation",
    "experts_implementation",
    "kernel_config",
    "fusion_config",
    "use_kernels",
)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than one whole model in plain numbers, or ours.

    Args:
        folder: with a config.json.

    Raises:
        InputError: broken or missing files, an adapter, another tool's codes, a tokenizer of more
            than 256 MiB, or a config that names code on the hub, or layers without weights.
    """
    config = read_json_object(folder / "config.json")
    check_config(config, folder)
    refuse_adapter(folder)
    require_small_tokenizer(folder)
    quantization = config.get("quantization_config")
    packed = isinstance(quantization, dict) and quantization.get("quant_method") == _OWN
    stored = check_weight_files(folder, packed=packed)
    _require_layers(config, len(stored), folder)


def _require_layers(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """Refuse far more layers than there are tensors: making them empty would come to no end."""
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, dict) else {}):
        for name in _LAYERS & fields.keys():
            count = fields[name]
            if isinstance(count, int | float) and count > _MOST_LAYERS_PER_TENSOR * tensors:
                raise InputError(
                    "The config speaks of layers that the weights do not have.",
                    where=folder / "config.json",
                    observed=f"{name} = {count}, {tensors} tensors",
                    change="copy the whole folder again",
                )


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config whose weights are quantised by another tool, or that names code on the hub.

    Raises:
        InputError: it is one.
    """
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method != _OWN:
            raise InputError(
                "The model is quantised already, by another tool.",
                where=where,
                observed=f"quant_method {method}",
                expected="weights in float32, float16 or bfloat16, or a skipcat checkpoint",
                change="start from the original weights",
            )
    for name, value in _code_fields(config):
        raise InputError(
            "The config asks for code from the hub.",
            where=where,
            observed=f"{name}: {value}",
            expected="an attention of transformers' own, or none",
            change="take the field out of config.json",
        )


def _code_fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields, at any depth, by which transformers would fetch kernels and run them."""
    for name, value in config.items():
        plain = str(name).strip("_").removesuffix("_internal")
        if plain in _CODE_FIELDS and _names_code(plain, value):
            yield str(name), value
        elif isinstance(value, dict):
            yield from _code_fields(value)


def _names_code(field: str, value: Any) -> bool:
    """Whether a value names a repository, rather than one of transformers' own ways."""
    if not field.endswith("implementation"):
        return bool(value)
    texts = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(text, str) and "/" in text for text in texts)


def refuse_adapter(folder: Path) -> None:
    """Refuse an adapter's folder: transformers would load the model that it names instead.

    Raises:
        InputError: it is one, or one lies beside a model.
    """
    found = sorted(path.name for path in folder.glob("adapter_*"))
    if found:
        raise InputError(
            "The folder holds an adapter, which is not applied.",
            where=folder,
            observed=", ".join(found),
            expected="a model without adapter files",
            change="merge the adapter into the model (merge_and_unload), or take its files out",
        )
