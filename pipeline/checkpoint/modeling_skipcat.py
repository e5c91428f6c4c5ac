"""Factored and quantised layers, and what transformers needs to load a checkpoint that holds them.

This file travels with every compressed checkpoint and depends on torch and transformers alone, so
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where skipcat is not
installed. Where skipcat is installed, importing it is enough and no remote code is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "skipcat"
FORMAT_VERSION = 2


class QuantizedWeight(nn.Module):
    """A quantised matrix [m, n]: w = (code - zero point) * scale.

    With offsets the zero point is -offset / scale, so that w = code * scale + offset.

    Args:
        rows: m.
        columns: n.
        format_name: `int4-b32-asym`: bits of a code, weights of a row that share a scale (`row`
            for all of them), and whether zero points are stored (`asym`), offsets are (`offset`),
            or neither and the zero points are 2^(bits - 1) (`sym`).
        device: where the codes are.

    Attributes:
        codes: uint8 [m, bytes]; the codes of a row one behind the other, the first in the lowest
            bits; the last block is filled up.
        scales: int16 [m, blocks], the bits of float16, which no cast of the model changes.
        zero_points: uint8 [m, bytes], packed likewise; only where the format has them.
        offsets: int16 [m, blocks], as scales; only where the format has them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor
    offsets: torch.Tensor

    def __init__(
        self, rows: int, columns: int, format_name: str, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        kind, block, self.zero = format_name.split("-")
        self.rows, self.columns, self.format_name = rows, columns, format_name
        self.bits = int(kind.removeprefix("int"))
        self.block = columns if block == "row" else int(block.removeprefix("b"))
        self.blocks = -(-columns // self.block)
        code_bytes, zero_bytes = (
            -(-count * self.bits // 8) for count in (self.blocks * self.block, self.blocks)
        )
        widths = {"codes": (code_bytes, torch.uint8), "scales": (self.blocks, torch.int16)}
        if self.zero == "asym":
            widths["zero_points"] = (zero_bytes, torch.uint8)
        elif self.zero == "offset":
            widths["offsets"] = (self.blocks, torch.int16)
        for name, (width, dtype) in widths.items():
            self.register_buffer(name, torch.zeros(rows, width, dtype=dtype, device=device))
        self._held: torch.Tensor | None = None

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in a type; computed at first use, and kept."""
        held = self._held
        if held is None or held.dtype != dtype or held.device != self.codes.device:
            held = self.picked(slice(None)).to(dtype)
            self._held = held
        return held

    def picked(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Some rows of the matrix, float32 [k, n]."""
        codes = _unpacked(self.codes[rows], self.bits, self.blocks * self.block)
        scales = self.scales[rows].view(torch.float16).float()
        zeros: torch.Tensor | int = 2 ** (self.bits - 1)
        if self.zero == "asym":
            zeros = _unpacked(self.zero_points[rows], self.bits, self.blocks).float()[..., None]
        elif self.zero == "offset":
            zeros = -(self.offsets[rows].view(torch.float16).float() / scales)[..., None]
        centred = codes.view(len(codes), self.blocks, self.block).float() - zeros
        return (centred * scales[..., None]).flatten(1)[:, : self.columns]


def _unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row, uint8 [m, count]."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        slots = (packed[..., None] >> shifts) & (2**bits - 1)
        return slots.flatten(1)[:, :count]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    every = ((packed[..., None] >> places) & 1).flatten(1)[:, : count * bits]
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (every.view(len(packed), count, bits) * weights).sum(-1, dtype=torch.uint8)


class _Typed(nn.Module):
    """A module whose `dtype` follows casts of the model, though its codes do not."""

    dtype: torch.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Typed:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class QuantizedLinear(_Typed):
    """A linear layer whose matrix is quantised, and multiplied in the type of its input.

    Args:
        in_features: n.
        out_features: m.
        format_name: see `QuantizedWeight`.
        bias: whether it has one.
        table: the embedding whose matrix this is, too; None if it has its own.
        device: where the parameters are made.
        dtype: of the bias, and of `weight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format_name: str,
        *,
        bias: bool = False,
        table: QuantizedEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        # A plain list hides the table from nn.Module, which would otherwise register it twice.
        self.table_reference = [] if table is None else [table]
        if table is None:
            self.stored = QuantizedWeight(out_features, in_features, format_name, device)
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @property
    def matrix(self) -> QuantizedWeight:
        """The codes, its own or those of the table."""
        return self.table_reference[0].stored if self.table_reference else self.stored

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, [m, n]."""
        return self.matrix.values(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, [..., n] to [..., m]."""
        return F.linear(x, self.matrix.values(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, {self.matrix.format_name}"


class QuantizedEmbedding(_Typed):
    """A quantised embedding; a row is computed when it is looked up.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns.
        format_name: see `QuantizedWeight`.
        device: where the codes are.
        dtype: of what it returns.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format_name: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()
        self.stored = QuantizedWeight(num_embeddings, embedding_dim, format_name, device)

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, [rows, columns]."""
        return self.stored.values(self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, int64 [...] to [..., columns]."""
        rows = self.stored.picked(ids.flatten()).to(self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.stored.format_name}"


class FactoredLinear(nn.Module):
    """A linear layer of rank r, in one of two forms.

    low_rank: y = up(down(x)), with down [r, n] and up [m, r].
    skip: y = up(x1 + down(x2)), with down [r, n - r], x1 and x2 picked from x by `permutation`.

    Layers that read the same input may share the latent: one of them, the owner, holds `down` and
    `permutation`, and the others only `up`.

    Args:
        in_features: n.
        out_features: m.
        rank: r.
        form: "low_rank" or "skip".
        bias: whether `up` has a bias.
        owner: the layer whose latent this one reads; None if it has its own.
        down_style: format of `down` (see `QuantizedWeight`); None for numbers of `dtype`.
        up_style: of `up`, likewise.
        device: where the parameters are made.
        dtype: their type.
    """

    permutation: torch.Tensor  # int32 [n]; only an owner in the form "skip" has one
    down: nn.Linear | QuantizedLinear
    up: nn.Linear | QuantizedLinear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        form: str,
        *,
        bias: bool = False,
        owner: FactoredLinear | None = None,
        down_style: str | None = None,
        up_style: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in ("low_rank", "skip"):
            raise ValueError(f"form {form!r} is neither 'low_rank' nor 'skip'")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.form = rank, form
        # A plain list hides the owner from nn.Module, which would otherwise register it twice.
        self.owner_reference = [] if owner is None else [owner]
        if owner is None:
            width = in_features - rank if form == "skip" else in_features
            self.down = _matrix_layer(width, rank, down_style, device=device, dtype=dtype)
            if form == "skip":
                places = torch.arange(in_features, dtype=torch.int32, device=device)
                self.register_buffer("permutation", places)
        self.up = _matrix_layer(rank, out_features, up_style, bias=bias, device=device, dtype=dtype)

    @property
    def owner(self) -> FactoredLinear:
        """The layer that holds `down`: this one, or the one it shares with."""
        return self.owner_reference[0] if self.owner_reference else self

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """The latent z, [..., n] to [..., r]; only the owner can compute it."""
        if self.form == "low_rank":
            return self.down(x)
        ordered = x.index_select(-1, self.permutation)
        return ordered[..., : self.rank] + self.down(ordered[..., self.rank :])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, [..., n] to [..., m]."""
        return self.up(self.owner.latent(x))

    def dense_weight(self) -> torch.Tensor:
        """The product W_r, float64 [m, n]."""
        owner, up = self.owner, self.up.weight.double()
        mixed = up @ owner.down.weight.double()
        if self.form == "low_rank":
            return mixed
        product = torch.cat([up, mixed], dim=1)
        return product[:, torch.argsort(owner.permutation.long())]

    def extra_repr(self) -> str:
        """What print(model) shows."""
        shared = ", shares its latent" if self.owner_reference else ""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, {self.form}{shared}"


def _matrix_layer(
    in_features: int, out_features: int, format_name: str | None, **keywords: Any
) -> nn.Linear | QuantizedLinear:
    """An nn.Linear, or a QuantizedLinear where a format is given; without bias unless asked."""
    if format_name is None:
        return nn.Linear(in_features, out_features, **({"bias": False} | keywords))
    return QuantizedLinear(in_features, out_features, format_name, **keywords)


def stored_layer(
    model: nn.Module, name: str, entry: dict[str, Any], device: torch.device | str | None = None
) -> nn.Module:
    """Make the empty layer that `entry` describes.

    Args:
        model: the model `name` belongs to; the layer's owner, if any, is in place already.
        name: dotted name of the nn.Linear or nn.Embedding to be replaced.
        entry: {"form", "rank", "owner"} as in `quantization_config.modules`, and for quantised
            matrices "down_style" and "up_style". Forms: "skip" and "low_rank" are factored;
            "dense" is a quantised matrix; "table" a quantised embedding; "head" a linear layer
            that reads the embedding of its owner.
        device: where its parameters are made; by default where those of the layer are.
    """
    layer = model.get_submodule(name)
    owner = model.get_submodule(entry["owner"]) if entry["owner"] else None
    form, down_style, up_style = entry["form"], entry.get("down_style"), entry.get("up_style")
    if form in ("table", "dense") and up_style is None:
        raise ValueError(f"{name} is {form}, and no format is given")
    weight = layer.weight
    keywords: dict[str, Any] = {
        "device": weight.device if device is None else device,
        "dtype": weight.dtype,
    }
    if form == "table":
        if not isinstance(layer, nn.Embedding):
            raise TypeError(f"{name} is a {type(layer).__name__}, not an nn.Embedding")
        sizes = (layer.num_embeddings, layer.embedding_dim)
        return QuantizedEmbedding(*sizes, str(up_style), **keywords)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is a {type(layer).__name__}, not an nn.Linear")
    shape = (layer.in_features, layer.out_features)
    if not 1 <= entry["rank"] <= layer.in_features:
        raise ValueError(f"{name} of {shape[1]} x {shape[0]} cannot have rank {entry['rank']}")
    keywords["bias"] = layer.bias is not None
    if form in ("dense", "head"):
        if not isinstance(owner, QuantizedEmbedding | None):
            raise TypeError(f"{name} reads {entry['owner']}, which is no quantised embedding")
        return QuantizedLinear(*shape, str(up_style), table=owner, **keywords)
    if not isinstance(owner, FactoredLinear | None):
        raise TypeError(f"{name} shares with {entry['owner']}, which is not factored")
    if owner is not None and (owner.rank, owner.form, owner.in_features) != (
        entry["rank"],
        form,
        layer.in_features,
    ):
        raise ValueError(f"{name} and {entry['owner']}, whose latent it reads, differ")
    keywords |= {"down_style": down_style, "up_style": up_style}
    return FactoredLinear(*shape, entry["rank"], form, owner=owner, **keywords)


def _require_entries(modules: object) -> None:
    """Raise ValueError or TypeError unless `modules` are entries as `stored_layer` reads them."""
    if not isinstance(modules, dict):
        raise TypeError("quantization_config.modules is not an object")
    for name, entry in modules.items():
        fields = entry if isinstance(entry, dict) else {}
        owner = fields.get("owner")
        known = fields.get("form") in ("skip", "low_rank", "dense", "table", "head")
        rank = fields.get("rank")
        styles = all(isinstance(fields.get(key, ""), str) for key in ("down_style", "up_style"))
        if not (known and type(rank) is int and rank > 0 and styles):
            raise ValueError(f"the entry of {name} in quantization_config.modules is broken")
        if owner is not None and not isinstance(modules.get(owner), dict):
            raise ValueError(f"{name} shares with {owner!r}, which has no entry")
        if owner is not None and modules[owner].get("owner") is not None:
            raise ValueError(f"{name} shares with {owner!r}, which shares itself")


def require_permutation(name: str, permutation: torch.Tensor) -> None:
    """Raise ValueError unless every input has one place: kernels read where it points.

    Args:
        name: of the layer, for the message.
        permutation: int32 [n].
    """
    places = torch.arange(len(permutation), dtype=permutation.dtype, device=permutation.device)
    if not torch.equal(permutation.sort().values, places):
        raise ValueError(
            f"{name}.permutation does not have every number from 0 to {len(places) - 1} once"
        )


class SkipCatConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: how which modules are stored.

    Args:
        modules: module name -> {"form", "rank", "owner"} and formats, as `stored_layer` reads them;
            "owner" is None for an owner.
        version: of this format.
    """

    newest = FORMAT_VERSION

    def __init__(
        self, modules: dict[str, dict[str, Any]], version: int = FORMAT_VERSION, **unused: Any
    ) -> None:
        if type(version) is not int or version > self.newest:
            raise ValueError(
                f"checkpoint format {version} is newer than {self.newest}: update skipcat"
            )
        _require_entries(modules)
        self.quant_method = QUANT_METHOD
        self.version = version
        self.modules = modules


class SkipCatQuantizer(HfQuantizer):
    """Puts the layers into the empty model before transformers fills in the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        modules = self.quantization_config.modules
        # Owners first: config.json is written with its keys sorted.
        for name, entry in sorted(modules.items(), key=lambda item: bool(item[1]["owner"])):
            model.set_submodule(name, stored_layer(model, name, entry))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in model.named_modules():
            places = (
                layer._buffers.get("permutation") if isinstance(layer, FactoredLinear) else None
            )
            if places is not None and not places.is_meta:
                require_permutation(name, places)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Factored checkpoints can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True


# Not the register_* decorators: they refuse a second registration, and both the installed package
# and the copy inside a checkpoint may be imported in one process.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SkipCatConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SkipCatQuantizer
