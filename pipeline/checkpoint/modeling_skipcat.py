"""Factored layers, and what transformers needs to load a checkpoint that holds stored layers.

This file travels with every compressed checkpoint and depends on torch, transformers and
`modeling_quantized.py` beside it alone, so
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where skipcat is not
installed. Where skipcat is installed, importing it is enough and no remote code is run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# Relative, so that it is found in the package and in the folder of a checkpoint.
from .modeling_quantized import (
    Codes,
    Int8Conv,
    QuantizedEmbedding,
    QuantizedLinear,
    RoundedActivation,
)

QUANT_METHOD = "skipcat"
FORMAT_VERSION = 2
# Forms of a network whose convolutions have a byte or less for each number.
FORMS_OF_BYTES = _CONV, _ACTIVATION, _FOLDED = "conv", "activation", "folded"


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

    @property
    def weight(self) -> torch.Tensor:
        """The product, [m, n] in the type of `up`: some models look at their layers' weights."""
        return self.dense_weight().to(self.up.weight.dtype)

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
            that reads the embedding of its owner. "conv", "activation" and "folded" have the
            codes of "input" and "output" instead, or None: a convolution whose kernel has "bits"
            a number, an activation that is rounded, and a norm that is part of the convolution
            before it.
        device: where its parameters are made; by default where those of the layer are.
    """
    layer = model.get_submodule(name)
    if entry["form"] in FORMS_OF_BYTES:
        return _layer_of_bytes(name, layer, entry, device)
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


def _layer_of_bytes(
    name: str, layer: nn.Module, entry: dict[str, Any], device: torch.device | str | None
) -> nn.Module:
    """What `stored_layer` makes of a network of rounded convolutions."""
    if entry["form"] == _FOLDED:
        return nn.Identity()
    if entry["form"] == _ACTIVATION:
        return RoundedActivation(layer, entry["output"], device)
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"{name} is a {type(layer).__name__}, not an nn.Conv2d")
    weight = layer.weight
    place = weight.device if device is None else device
    codes = (entry["input"], entry["output"], entry["bits"])
    return Int8Conv(layer, *codes, device=place, dtype=weight.dtype)


def _require_codes(name: str, fields: dict[str, Any]) -> None:
    """Raise ValueError unless the entry of a rounded network names codes where it must."""
    needed = {_CONV: ("input", "output"), _ACTIVATION: ("output",), _FOLDED: ()}[fields["form"]]
    for part in needed:
        codes = fields.get(part, "")
        if codes is not None or fields["form"] == _ACTIVATION:
            Codes.parse(str(codes))
    if fields["form"] == _CONV:
        Codes.parse(f"int{fields.get('bits')}")
    if fields.get("owner") is not None:
        raise ValueError(f"{name} shares with {fields['owner']!r}, and has nothing to share")


def _require_entries(modules: object) -> None:
    """Raise ValueError or TypeError unless `modules` are entries as `stored_layer` reads them."""
    if not isinstance(modules, dict):
        raise TypeError("quantization_config.modules is not an object")
    for name, entry in modules.items():
        fields = entry if isinstance(entry, dict) else {}
        if fields.get("form") in FORMS_OF_BYTES:
            _require_codes(name, fields)
            continue
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
