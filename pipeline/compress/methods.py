"""The methods by name, ours and those it is measured against, and how much work each may do.

The command line reads this file for its choices: it imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_METHOD = "skipcat-kl"
DEFAULT_EFFORT = "default"
# What --rotate turns, folded into the weights (see `pipeline.compress.rotation`).
ROTATIONS = ("off", "values", "all")
# Ways to turn a target into a product B A, and a matrix into low-bit codes.
TRUNCATED = "pipeline.compress.factorize.whitened_svd:truncated"
_RECONSTRUCTED = "pipeline.compress.factorize.whitened_svd:reconstructed"
_GPTQ = "pipeline.compress.factorize.factors:GPTQ"
_RTN = "pipeline.compress.factorize.factors:RTN"


@dataclass(frozen=True)
class _Allocation:
    """How a budget is divided among the groups.

    Attributes:
        name: as recipe.json writes it.
        function: `module:name` of (calibrated, budget) -> plan, where `calibrated` is a
            `pipeline.compress.calibrated.Calibrated` and `budget` a `RankBudget`.
        needs_costs: whether it reads the expected KL of every rank, which takes gradients.
    """

    name: str
    function: str
    needs_costs: bool = False


_UNIFORM = _Allocation("uniform", "pipeline.compress.plan.plan:allocate_uniformly")
_BY_LOSS = _Allocation("by-loss", "pipeline.compress.plan.svd_llm_v2:allocate_by_loss")
_SEARCHED = _Allocation("searched", "pipeline.compress.plan.rank_search:allocate_by_cost", True)


@dataclass(frozen=True)
class Fit:
    """How factors are fitted.

    Attributes:
        two_sided: outputs weigh what the model's own output says they are worth.
        mix: None fits every layer to what it saw in the original model; a number fits it to what
            the compressed model feeds it, with this share of the original's output in its target.
        factorize: `module:name` of (stack, target, rank, inputs, geometry, sensitivities) -> B, A.
        quantize: `module:name` of a `Rounding`: how matrices and factors are quantised.
        learned_steps: then codes and scales of a layer are learned together, in so many steps.
    """

    two_sided: bool = True
    mix: float | None = None
    factorize: str = TRUNCATED
    quantize: str = _GPTQ
    learned_steps: int = 0

    def describe(self) -> dict[str, Any]:
        """The entry of recipe.json."""
        return {
            "two_sided": self.two_sided,
            "mix": self.mix,
            "reconstruct": self.factorize == _RECONSTRUCTED,
            "nearest": self.quantize == _RTN,
            **({"learned_steps": self.learned_steps} if self.learned_steps else {}),
        }


@dataclass(frozen=True)
class _CacheFit:
    """How the KV cache is made smaller, where it has a budget.

    Attributes:
        allocate: `module:name` of (problem) -> plan, a `CacheProblem` and a `CachePlan`.
        two_sided: keys and values weigh what the model's own output says they are worth.
        centred: their mean is taken apart, instead of being spanned.
    """

    allocate: str = "pipeline.compress.cache.cache_search:searched_cache"
    two_sided: bool = True
    centred: bool = True


@dataclass(frozen=True)
class _ConvRounding:
    """How the convolutions of a network are rounded.

    Attributes:
        bits: of a code of a kernel.
        activation_bits: of one of an activation.
        observer: how the range of an activation is chosen, a name in `int8.ranges.OBSERVERS`.
        per_channel: every output of a kernel has a scale of its own.
        squares: scales of kernels are of least squared error, instead of holding every weight.
    """

    bits: int = 8
    activation_bits: int = 8
    observer: str = "mse"
    per_channel: bool = True
    squares: bool = True

    @property
    def summary(self) -> str:
        """For the help and the model card."""
        activations = f", activations in {self.activation_bits}" * (
            self.activation_bits != self.bits
        )
        scales = "a scale for each output" if self.per_channel else "a scale a kernel"
        ranges = (
            "of least squared error" if self.observer == "mse" else "that hold all that was seen"
        )
        return f"convolutions in {self.bits} bits{activations}, ranges {ranges}, {scales}"


_ROUNDED_BITS = (8, 6, 4)


@dataclass(frozen=True)
class Method:
    """How a model is compressed.

    Attributes:
        summary: for the help and the model card.
        cat: matrices that share an input may share their right factor.
        skip: factors are stored in block-skip form.
        allocation: where rank goes.
        fit: how the factors are fitted.
        quantizer: matrices stay dense, in one low-bit format that the user names.
        cache: what becomes of the KV cache under a budget of its own.
        cache_alone: the weights stay as they are.
        convolutions: of networks of convolutions; None is for linear layers.
    """

    summary: str
    cat: bool
    skip: bool
    allocation: _Allocation
    fit: Fit
    quantizer: bool = False
    cache: _CacheFit = _CacheFit()
    cache_alone: bool = False
    convolutions: _ConvRounding | None = None

    @property
    def needs_costs(self) -> bool:
        """Whether gradients of the model are needed."""
        return self.allocation.needs_costs or self.fit.two_sided

    def describe(self) -> dict[str, Any]:
        """The entry of recipe.json."""
        return {
            "summary": self.summary,
            "cat": self.cat,
            "skip": self.skip,
            "allocation": self.allocation.name,
            "fit": self.fit.describe(),
            "quantizer": self.quantizer,
            **({"convolutions": asdict(self.convolutions)} if self.convolutions else {}),
        }


ONE_SIDED = Fit(two_sided=False)


def _conv_methods() -> dict[str, Method]:
    """Convolutions in so many bits: kernels and activations, kernels alone, and worse ranges."""
    rows = {}
    for bits in _ROUNDED_BITS:
        rows[f"int{bits}"] = _ConvRounding(bits, bits)
        if bits < max(_ROUNDED_BITS):
            rows[f"int{bits}-kernels"] = _ConvRounding(bits)
        rows[f"int{bits}-min-max-channel"] = _ConvRounding(bits, bits, "min-max", squares=False)
        rows[f"int{bits}-min-max"] = _ConvRounding(bits, bits, "min-max", False, False)
    return {
        name: Method(how.summary, False, False, _UNIFORM, ONE_SIDED, convolutions=how)
        for name, how in rows.items()
    }


def _palu(summary: str, allocate: str) -> Method:
    """Palu: one-sided, the mean spanned, and the weights as they are."""
    cache = _CacheFit(f"pipeline.compress.cache.palu:{allocate}", two_sided=False, centred=False)
    return Method(summary, False, False, _UNIFORM, ONE_SIDED, cache=cache, cache_alone=True)


METHODS = {
    # Wang et al., ICLR 2025; NAACL 2025
    "svd-llm": Method("whitened SVD (SVD-LLM)", False, False, _UNIFORM, ONE_SIDED),
    "svd-llm-v2": Method(
        "whitened SVD, ranks by truncation loss (SVD-LLM v2)", False, False, _BY_LOSS, ONE_SIDED
    ),
    "mpifa": Method(
        "pivoted factors with reconstruction (MPIFA)",
        False,
        True,
        _UNIFORM,
        Fit(two_sided=False, mix=0.25, factorize=_RECONSTRUCTED),
    ),
    "cat": Method("whitened SVD, shared (Cat)", True, False, _UNIFORM, ONE_SIDED),
    "skip": Method("whitened SVD, block-skip (Skip)", False, True, _UNIFORM, ONE_SIDED),
    "skipcat": Method("shared and block-skip (SkipCat)", True, True, _UNIFORM, ONE_SIDED),
    "rtn": Method(
        "every number rounded to its nearest (RTN)",
        False,
        False,
        _UNIFORM,
        Fit(two_sided=False, quantize=_RTN),
        quantizer=True,
    ),
    "gptq": Method(
        "rounded with errors fed forward along rows (GPTQ)",
        False,
        False,
        _UNIFORM,
        Fit(two_sided=False, mix=0.0),
        quantizer=True,
    ),
    **_conv_methods(),
    # Chang et al., ICLR 2025
    "palu": _palu(
        "latents of keys and values alone, ranks by Fisher information of weights (Palu)",
        "allocate_by_fisher",
    ),
    "palu-uniform": _palu("the same, of the same rank everywhere (Palu)", "allocate_uniformly"),
    DEFAULT_METHOD: Method(
        "block-skip, two-sided, ranks and sharing by expected KL", True, True, _SEARCHED, Fit()
    ),
}


@dataclass(frozen=True)
class Effort:
    """How much calibration text is read, and how it is used.

    Attributes:
        windows: calibration windows.
        window_length: tokens in each.
        survey_windows: how many of them the gradients are taken on.
        mix: of a method of ours: None fits each layer once; a number fits each to what the
            compressed model feeds it (see `Fit`).
        rounding_steps: of each layer, where rounding is learned.
        tokens_per_width: no more windows of a decoder's text than hold so many tokens for each
            number of its widest input, or than the gradients need, if nobody asked for more; None
            reads them all.
        prices: measure what errors in each layer of a first plan cost, and plan again.
    """

    windows: int
    window_length: int
    survey_windows: int
    mix: float | None
    rounding_steps: int
    tokens_per_width: int | None = None
    prices: bool = True

    def windows_for(self, width: int) -> int:
        """Windows of a decoder's text, given how many numbers its widest input has."""
        if self.tokens_per_width is None:
            return self.windows
        enough = math.ceil(self.tokens_per_width * width / self.window_length)
        return min(self.windows, max(enough, self.survey_windows))


EFFORTS = {
    # Text does more for the gradients than for the moments, which the widest input wants most of.
    "fast": Effort(
        64, 512, survey_windows=20, mix=None, rounding_steps=32, tokens_per_width=11, prices=False
    ),
    DEFAULT_EFFORT: Effort(128, 512, survey_windows=64, mix=0.5, rounding_steps=128),
    "max": Effort(384, 512, survey_windows=128, mix=0.5, rounding_steps=512),
}
