"""Pass or fail: a stage's measurements against its tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field

from validate.compare import Comparison
from validate.stages import Tolerance

PASS = "pass"
FAIL = "fail"
MEASURED = "measured"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Verdict:
    """What the ledger says about a stage.

    Attributes:
        status: `pass`, `fail`, `measured` (nothing was demanded) or `not run`.
        reasons: why it failed or did not run; one sentence each.
        counts_as_failure: whether it makes the whole ledger fail.
    """

    status: str
    reasons: list[str] = field(default_factory=list)
    counts_as_failure: bool = False


def not_run(reason: str, *, required: bool) -> Verdict:
    """The verdict on a stage that could not be loaded or broke while running."""
    return Verdict(NOT_RUN, [reason], required)


def judge(
    tolerance: Tolerance,
    to_reference: Comparison | None,
    to_original: Comparison | None,
    perplexity: float | None,
    *,
    is_original: bool = False,
) -> Verdict:
    """Hold a stage that ran against its tolerance.

    Args:
        tolerance: what is demanded.
        to_reference: against the stage it should equal; None if that one did not run.
        to_original: against the original; None if that one did not run.
        perplexity: its own; NaN is a failure whatever the tolerance. None for images.
        is_original: it is the baseline, and there is nothing to compare it with.
    """
    reasons = finite_reasons(to_reference or to_original, perplexity)
    if not is_original:
        reasons += reference_reasons(tolerance, to_reference)
        reasons += original_reasons(tolerance, to_original)
    if reasons:
        return Verdict(FAIL, reasons, counts_as_failure=True)
    return Verdict(MEASURED if tolerance.is_free else PASS)


def finite_reasons(comparison: Comparison | None, perplexity: float | None) -> list[str]:
    """Complaints about NaN and infinity."""
    reasons = []
    if comparison is not None and not comparison.metrics.is_finite:
        reasons.append("its logits hold NaN or infinity")
    if perplexity is not None and not perplexity < float("inf"):
        reasons.append(f"its perplexity is {perplexity}")
    return reasons


def reference_reasons(tolerance: Tolerance, comparison: Comparison | None) -> list[str]:
    """Complaints about the distance to the reference stage; `not >=` so that NaN fails."""
    if not tolerance.needs_reference:
        return []
    if comparison is None:
        return ["it cannot be judged, since its reference did not run"]
    metrics, reasons = comparison.metrics, []
    least, most = tolerance.min_cosine, tolerance.max_relative_error
    if least is not None and not metrics.min_cosine >= least:
        reasons.append(
            f"cosine with '{comparison.other}' is {metrics.min_cosine:.7f} at the worst token, "
            f"at least {least} is demanded"
        )
    if most is not None and not metrics.relative_error <= most:
        reasons.append(
            f"relative error to '{comparison.other}' is {metrics.relative_error:.2e}, "
            f"at most {most:.0e} is allowed"
        )
    limit = tolerance.max_kl_to_reference
    if limit is not None and not metrics.kl_mean <= limit:
        reasons.append(
            f"KL to '{comparison.other}' is {metrics.kl_mean:.4g} nats per token, "
            f"at most {limit:g} is allowed"
        )
    return reasons


def original_reasons(tolerance: Tolerance, comparison: Comparison | None) -> list[str]:
    """Complaints about the divergence from the original."""
    if tolerance.max_kl is None:
        return []
    if comparison is None:
        return ["its divergence cannot be judged, since the original did not run"]
    if not comparison.metrics.kl_mean <= tolerance.max_kl:
        return [
            f"KL to the original is {comparison.metrics.kl_mean:.4g} nats per token, "
            f"at most {tolerance.max_kl:g} is allowed"
        ]
    return []
