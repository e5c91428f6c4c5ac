"""The methods by name, ours and those it is measured against, and how much work each may do.

The command line reads this file for its choices: it imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Allocation = Literal["uniform", "by-loss", "searched"]
DEFAULT_METHOD = "skipcat-kl"
DEFAULT_EFFORT = "default"


@dataclass(frozen=True)
class Fit:
    """How factors are fitted.

    Attributes:
        two_sided: outputs weigh what the model's own output says they are worth.
        mix: None fits every layer to what it saw in the original model; a number fits it to what
            the compressed model feeds it, with this share of the original's output in its target.
        reconstruct: after a one-sided start, one update of each factor in turn, as MPIFA does.
        nearest: what goes into few bits is rounded to the nearest, and no error is fed forward.
    """

    two_sided: bool = True
    mix: float | None = None
    reconstruct: bool = False
    nearest: bool = False


@dataclass(frozen=True)
class Method:
    """How a model is compressed.

    Attributes:
        summary: for the help and the model card.
        cat: matrices that share an input may share their right factor.
        skip: factors are stored in block-skip form.
        allocation: where rank goes. "uniform": the same kept fraction everywhere. "by-loss": more
            is taken where truncation loses less, among matrices of one kind (SVD-LLM v2).
            "searched": least expected KL to the original under one global budget.
        fit: how the factors are fitted.
        quantizer: matrices stay dense, in one format of few bits that the user names.
    """

    summary: str
    cat: bool
    skip: bool
    allocation: Allocation
    fit: Fit
    quantizer: bool = False

    @property
    def needs_survey(self) -> bool:
        """Whether gradients of the model are needed."""
        return self.allocation == "searched" or self.fit.two_sided


ONE_SIDED = Fit(two_sided=False)
METHODS = {
    "svd-llm": Method("whitened SVD (SVD-LLM)", False, False, "uniform", ONE_SIDED),
    "svd-llm-v2": Method(
        "whitened SVD, ranks by truncation loss (SVD-LLM v2)", False, False, "by-loss", ONE_SIDED
    ),
    "mpifa": Method(
        "pivoted factors with reconstruction (MPIFA)",
        False,
        True,
        "uniform",
        Fit(two_sided=False, mix=0.25, reconstruct=True),
    ),
    "cat": Method("whitened SVD, shared (Cat)", True, False, "uniform", ONE_SIDED),
    "skip": Method("whitened SVD, block-skip (Skip)", False, True, "uniform", ONE_SIDED),
    "skipcat": Method("shared and block-skip (SkipCat)", True, True, "uniform", ONE_SIDED),
    "rtn": Method(
        "every number rounded to its nearest (RTN)",
        False,
        False,
        "uniform",
        Fit(two_sided=False, nearest=True),
        quantizer=True,
    ),
    "gptq": Method(
        "rounded with errors fed forward along rows (GPTQ)",
        False,
        False,
        "uniform",
        Fit(two_sided=False, mix=0.0),
        quantizer=True,
    ),
    DEFAULT_METHOD: Method(
        "block-skip, two-sided, ranks and sharing by expected KL", True, True, "searched", Fit()
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
    """

    windows: int
    window_length: int
    survey_windows: int
    mix: float | None


EFFORTS = {
    "fast": Effort(windows=64, window_length=512, survey_windows=16, mix=None),
    DEFAULT_EFFORT: Effort(windows=128, window_length=512, survey_windows=64, mix=0.5),
    "max": Effort(windows=384, window_length=512, survey_windows=128, mix=0.5),
}
