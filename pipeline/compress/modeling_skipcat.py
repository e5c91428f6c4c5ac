"""Factored linear layers, and what transformers needs to load a checkpoint that holds them.

This file travels with every compressed checkpoint and depends on torch and transformers alone, so
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

QUANT_METHOD = "skipcat"
FORMAT_VERSION = 1


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
        device: where the parameters are made.
        dtype: their type.
    """

    permutation: torch.Tensor  # int32 [n]; only an owner in the form "skip" has one
    down: nn.Linear
    up: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        form: str,
        *,
        bias: bool = False,
        owner: FactoredLinear | None = None,
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
            self.down = nn.Linear(width, rank, bias=False, device=device, dtype=dtype)
            if form == "skip":
                places = torch.arange(in_features, dtype=torch.int32, device=device)
                self.register_buffer("permutation", places)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

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


def factored_linear(
    model: nn.Module, name: str, entry: dict[str, Any], device: torch.device | str | None = None
) -> FactoredLinear:
    """Make the empty factored layer that `entry` describes.

    Args:
        model: the model `name` belongs to; the layer's owner, if any, is in place already.
        name: dotted name of the nn.Linear to be replaced.
        entry: {"form", "rank", "owner"} as in `quantization_config.modules`.
        device: where its parameters are made; by default where those of the linear are.
    """
    linear = model.get_submodule(name)
    owner = model.get_submodule(entry["owner"]) if entry["owner"] else None
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not an nn.Linear")
    if not isinstance(owner, FactoredLinear | None):
        raise TypeError(f"{name} shares with {entry['owner']}, which is not factored")
    return FactoredLinear(
        linear.in_features,
        linear.out_features,
        entry["rank"],
        entry["form"],
        bias=linear.bias is not None,
        owner=owner,
        device=linear.weight.device if device is None else device,
        dtype=linear.weight.dtype,
    )


class SkipCatConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: which modules are factored, and how.

    Args:
        modules: module name -> {"form", "rank", "owner"}; "owner" is None for an owner.
        version: of this format.
    """

    def __init__(
        self, modules: dict[str, dict[str, Any]], version: int = FORMAT_VERSION, **unused: Any
    ) -> None:
        if version > FORMAT_VERSION:
            raise ValueError(
                f"checkpoint format {version} is newer than {FORMAT_VERSION}: update skipcat"
            )
        self.quant_method = QUANT_METHOD
        self.version = version
        self.modules = modules


class SkipCatQuantizer(HfQuantizer):
    """Puts factored layers into the empty model before transformers fills in the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        modules = self.quantization_config.modules
        # Owners first: config.json is written with its keys sorted.
        for name, entry in sorted(modules.items(), key=lambda item: bool(item[1]["owner"])):
            model.set_submodule(name, factored_linear(model, name, entry))
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
