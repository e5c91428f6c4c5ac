"""A model whose matrices hold no numbers: enough to trace, whatever the model weighs.

Vectors (norm gains, biases, permutations) and tables (an image's positions) are read, because the
exporter computes with them; the matrix of a layer is a stand-in of one number, and its real values
go from the checkpoint's file to the ONNX file one matrix at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from pipeline.checkpoint.folder import read_architecture, require_exact, require_recorded_weights
from pipeline.checkpoint.modeling_cache import SmallCacheConfig, SmallCacheQuantizer
from pipeline.checkpoint.modeling_quantized import QuantizedWeight
from pipeline.checkpoint.modeling_skipcat import FORMS_OF_BYTES, require_permutation
from pipeline.errors import InputError
from pipeline.model.loading import explaining, settle_ties
from pipeline.model.numbers import cast, require_finite
from pipeline.model.weight_files import read_header, weight_files
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks

# What hands its weight to an operator as it is; nothing else is known not to be computed with.
_LAYERS = (nn.Linear, nn.Embedding, _ConvNd, Conv1D)
# Beyond this size nothing is read, whatever holds it: tables are smaller, experts are larger.
_PERMUTATION = ".permutation"
_LARGEST_TABLE_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a safetensors file.

    Attributes:
        file: the file.
        name: of the tensor in it.
        shape: [m, n].
        dtype: what it is cast to when it is read.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def lazy_tensor(self, name: str) -> ir.LazyTensor:
        """The matrix as ONNX IR, read each time it is asked for and never kept."""
        return ir.LazyTensor(
            lambda: ir.tensor(self.read().numpy(), name=name),
            dtype=ir.DataType.FLOAT16 if self.dtype == torch.float16 else ir.DataType.FLOAT,
            shape=ir.Shape(self.shape),
            name=name,
        )

    def read(self) -> torch.Tensor:
        """The values, in `dtype`.

        Raises:
            InputError: one is not finite, or does not fit the type.
        """
        with safe_open(self.file, framework="pt") as tensors:
            return cast(self.name, tensors.get_tensor(self.name), self.dtype, self.file)


@dataclass(frozen=True)
class QuantizedMatrix(StoredMatrix):
    """A matrix that a safetensors file holds as codes, in two or three tensors.

    Attributes:
        name: what the names of its tensors begin with.
        format: of the codes.
    """

    format: Format

    def read(self) -> torch.Tensor:
        """What the codes stand for, in `dtype`."""
        return cast(self.name, torch.from_numpy(self.codes().dequantized()), self.dtype, self.file)

    def codes(self) -> Blocks:
        """Codes, scales and zero points."""
        with safe_open(self.file, framework="pt") as tensors:
            names = [n for n in tensors.keys() if n.startswith(self.name)]  # noqa: SIM118 - no dict
            parts = {n.removeprefix(self.name): tensors.get_tensor(n) for n in names}
        for part in {"scales", "offsets"} & parts.keys():
            require_finite(self.name + part, parts[part].view(torch.float16), self.file)
        return Blocks.from_stored(parts, self.format, self.shape[1])


@dataclass(frozen=True)
class Skeleton:
    """A model to trace, and where the matrices it lacks are.

    Attributes:
        folder: the checkpoint.
        model: in evaluation mode; the matrix of every layer is a stand-in.
        matrices: parameter name -> its place on disk.
    """

    folder: Path
    model: PreTrainedModel
    matrices: dict[str, StoredMatrix]

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Skeleton:
        """Read a checkpoint's structure, vectors and tables, and find its matrices.

        Args:
            folder: a compressed or plain Hugging Face folder.
            dtype: of the graph to be.
            trust_remote_code: let Python code that comes with the model run.

        Raises:
            InputError: no such folder, broken weights, or tensors missing, superfluous, misshapen,
                not finite, or beyond `dtype`.
        """
        model, formats = _empty_model(folder, dtype, trust_remote_code)
        places = _places(folder, model)
        matrices: dict[str, StoredMatrix] = {}
        for name, format_ in formats.items():
            matrices[f"{name}.weight"] = _quantized_matrix(
                folder, model, name, format_, places, dtype
            )
        _join_equal_ties(model, places)
        missing = _require_match(folder, model, places, set(matrices))
        for number, (name, matrix) in enumerate(matrices.items(), start=len(places)):
            _set(model, name, _stand_in(number, matrix.shape, dtype))
        for number, (name, place) in enumerate(sorted(places.items())):
            if _is_matrix(model, name, place.shape):
                matrices[name] = StoredMatrix(place.file, place.name, place.shape, dtype)
                _set(model, name, _stand_in(number, place.shape, dtype))
            else:
                read = place.read()
                if name.endswith(_PERMUTATION):
                    _require_permutation(place, read)
                _set(model, name, cast(place.name, read, dtype, place.file))
        # As from_pretrained: towards whichever of the names is there, and not where both are.
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        require_exact(folder, {"missing_keys": missing})
        require_recorded_weights(folder)
        settle_ties(model, folder)
        return cls(folder, model.eval(), _with_tied_names(model, matrices))


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored, under which name, and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.name)


def _require_permutation(place: _Place, read: torch.Tensor) -> None:
    try:
        require_permutation(place.name.removesuffix(_PERMUTATION), read)
    except ValueError as error:
        raise InputError(
            "The checkpoint could not be read.", where=place.file, observed=error
        ) from error


def _is_matrix(model: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a layer's matrix, or too large to be read."""
    if len(shape) < 2:
        return False
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    if last in module._buffers:
        return False
    largest = math.prod(shape) * torch.float32.itemsize > _LARGEST_TABLE_BYTES
    return largest or (last == "weight" and isinstance(module, _LAYERS))


def _with_tied_names(
    model: PreTrainedModel, matrices: dict[str, StoredMatrix]
) -> dict[str, StoredMatrix]:
    """The matrices under every name that the model knows them by."""
    names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    stored = {names[name]: matrix for name, matrix in matrices.items()}
    return {name: stored[key] for name, key in names.items() if key in stored}


def _quantized_matrix(
    folder: Path,
    model: PreTrainedModel,
    name: str,
    format_: str,
    places: dict[str, _Place],
    dtype: torch.dtype,
) -> QuantizedMatrix:
    """The matrix behind `name`; takes its tensors out of `places`."""
    prefix = f"{name}.stored."
    rows, columns = model.get_submodule(name).weight.shape
    empty = QuantizedWeight(rows, columns, format_, "meta")
    expected = {f"{prefix}{n}": tensor for n, tensor in empty.named_buffers()}
    found = {n: places.pop(n) for n in expected if n in places}
    require_exact(
        folder,
        {
            "missing_keys": set(expected) - set(found),
            "mismatched_keys": [
                (n, place.shape, expected[n].shape)
                for n, place in found.items()
                if place.shape != tuple(expected[n].shape)
            ],
        },
    )
    first, place = next(iter(found.items()))
    stored_prefix = place.name.removesuffix(first.removeprefix(prefix))
    return QuantizedMatrix(place.file, stored_prefix, (rows, columns), dtype, Format.parse(format_))


def _empty_model(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, str]]:
    """The architecture with factored layers in place, parameters on the meta device.

    Quantised matrices are ordinary ones there; their formats are returned by the module's name.
    """
    formats: dict[str, str] = {}
    config, model_class = read_architecture(folder, trust_remote_code=trust_remote_code)
    with explaining("The checkpoint could not be read.", folder):
        quantization = getattr(config, "quantization_config", None)
        parsed = SmallCacheConfig({}) if quantization is None else _parsed(quantization)
        modules = parsed.modules
        if any(entry["form"] == "head" for entry in modules.values()):
            config.tie_word_embeddings = True
        with init_empty_weights(include_buffers=False):
            if hasattr(model_class, "from_config"):
                model = model_class.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
            else:
                model = model_class._from_config(config, dtype=dtype)
            if quantization is not None:
                factored, formats = _unquantized(modules)
                bare = SmallCacheConfig(factored, caches=getattr(parsed, "caches", None))
                SmallCacheQuantizer(bare)._process_model_before_weight_loading(model)
    model.config.name_or_path = str(folder)
    return model, formats


def _unquantized(
    modules: dict[str, dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The entries of factored layers alone, and the format of every quantised matrix.

    Returns:
        `quantization_config.modules` as if nothing was quantised, and nn.Linear or nn.Embedding
        -> its format.
    """
    factored, formats = {}, {}
    for name, entry in modules.items():
        if entry["form"] in FORMS_OF_BYTES:  # of convolutions, whose codes are read at once
            factored[name] = entry
            continue
        is_factored = entry["form"] in ("skip", "low_rank")
        if is_factored:
            factored[name] = {key: entry[key] for key in ("form", "rank", "owner")}
        if is_factored and entry["owner"] is None and "down_style" in entry:
            formats[f"{name}.down"] = entry["down_style"]
        if "up_style" in entry and entry["form"] != "head":
            formats[f"{name}.up" if is_factored else name] = entry["up_style"]
    return factored, formats


def _parsed(quantization: object) -> SmallCacheConfig:
    """`quantization_config` as an object; another tool's was refused before."""
    if isinstance(quantization, SmallCacheConfig):
        return quantization
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    return SmallCacheConfig(**fields)


def _places(folder: Path, model: PreTrainedModel) -> dict[str, _Place]:
    """The name of each stored tensor in the model -> where it is.

    A file may have older names than the model has; transformers knows how they were changed.
    """
    renamings = [
        change
        for change in get_model_conversion_mapping(model)
        if isinstance(change, WeightRenaming)
    ]
    own = model.state_dict()
    places: dict[str, _Place] = {}
    for file in weight_files(folder):
        for stored, (_, shape) in read_header(file).items():
            name, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, own)
            if name not in own and stored in own:
                name = stored
            places[name] = _Place(file, stored, shape)
    return places


def _join_equal_ties(model: PreTrainedModel, places: dict[str, _Place]) -> None:
    """Forget the second of two tensors that the model ties, where the file holds both, equal."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if (
            target in places
            and source in places
            and torch.equal(places[target].read(), places[source].read())
        ):
            del places[target]


def _require_match(
    folder: Path, model: PreTrainedModel, places: dict[str, _Place], found: set[str]
) -> set[str]:
    """Hold the files to what the strict loader asks: no tensor but the model's, of its shape.

    Args:
        folder: for the message.
        model: without numbers.
        places: what the files hold; what the model does not use is taken out.
        found: quantised matrices, which were looked at already.

    Returns:
        The tensors that are missing, unless they are tied to others.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    info: Any = SimpleNamespace(
        missing_keys=set(expected) - set(places) - found,
        unexpected_keys=set(places) - set(expected) | set(places) & found,
    )
    differ = {
        (name, p.shape, expected[name])
        for name, p in places.items()
        if p.shape != expected.get(name, p.shape)
    }
    # The model's class knows which tensors of older versions it no longer uses.
    model._adjust_missing_and_unexpected_keys(info)
    require_exact(folder, {"unexpected_keys": info.unexpected_keys, "mismatched_keys": differ})
    for name in set(places) - set(expected):
        del places[name]
    missing: set[str] = info.missing_keys
    return missing


def _stand_in(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that shape that occupies one number, which is not a number.

    Whatever is computed from it is not a number either, and is found by that. Each has a bit
    pattern of its own, so that nothing takes two of them for the same constant; in float16 there
    are 2,046 patterns, and what merges constants looks at those of up to 1,024 numbers alone.
    """
    bits, infinity, payloads = (
        (torch.int16, 0x7C00, 1023)
        if dtype == torch.float16
        else (torch.int32, 0x7F800000, 1 << 22)
    )
    sign = -1 - torch.iinfo(bits).max if number // payloads % 2 else 0
    pattern = torch.tensor((infinity | 1 + number % payloads) + sign, dtype=bits)
    return pattern.view(dtype).expand(shape)


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter or buffer into its module."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._buffers:
        module._buffers[last] = tensor
    else:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
