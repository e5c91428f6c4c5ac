"""Pass or fail: a stage's measurements against its tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.provenance import public_text
from validate.compare import Comparison
from validate.stages import Tolerance

_PASS = "pass"
_FAIL = "fail"
_MEASURED = "measured"
_NOT_RUN = "not run"
_CACHED = " behind a cache"


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

    @classmethod
    def not_run(cls, reason: str, *, required: bool) -> Verdict:
        """The verdict on a stage that could not be loaded or broke while running."""
        return cls(_NOT_RUN, [public_text(reason)], required)

    @classmethod
    def judge(
        cls,
        tolerance: Tolerance,
        to_reference: Comparison | None,
        to_original: Comparison | None,
        complaints: Sequence[str] = (),
        *,
        item: str = "token",
        kl_item: str | None = None,
        is_original: bool = False,
        cached: tuple[Comparison | None, Comparison | None] = (None, None),
    ) -> Verdict:
        """Hold a stage that ran against its tolerance.

        Args:
            tolerance: what is demanded.
            to_reference: against the stage it should equal; None if that one did not run.
            to_original: against the original; None if that one did not run.
            complaints: what is a failure beside the logits.
            item: what a row of logits is of.
            kl_item: what a figure of KL is of; None for the same.
            is_original: it is the baseline, and there is nothing to compare it with.
            cached: as `to_reference` and `to_original`, of tokens behind a cache.
        """
        reasons = [
            f"its logits{where} hold NaN or infinity"
            for where, one in (
                ("", to_reference or to_original),
                (_CACHED, cached[0] or cached[1]),
            )
            if one is not None and not one.metrics.is_finite
        ]
        reasons += complaints
        if not is_original:
            reasons += _reference_reasons(tolerance, to_reference, item, kl_item or item)
            reasons += _original_reasons(tolerance, to_original, kl_item or item)
            if cached[0] is not None:
                behind = item + _CACHED
                reasons += _reference_reasons(tolerance, cached[0], behind, behind)
            if cached[1] is not None:
                reasons += _original_reasons(tolerance, cached[1], item + _CACHED)
        if reasons:
            return cls(_FAIL, reasons, counts_as_failure=True)
        return cls(_MEASURED if tolerance.is_free else _PASS)


def _reference_reasons(
    tolerance: Tolerance, comparison: Comparison | None, item: str, kl_item: str
) -> list[str]:
    """Complaints about the distance to the reference stage; `not >=` so that NaN fails."""
    if not tolerance.needs_reference:
        return []
    if comparison is None:
        return ["it cannot be judged, since its reference did not run"]
    metrics, reasons = comparison.metrics, []
    least, most = tolerance.min_cosine, tolerance.max_relative_error
    if least is not None and not metrics.min_cosine >= least:
        reasons.append(
            f"cosine with '{comparison.other}' is {metrics.min_cosine:.7f} at the worst {item}, "
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
            f"KL to '{comparison.other}' is {metrics.kl_mean:.4g} nats per {kl_item}, "
            f"at most {limit:g} is allowed"
        )
    if not reasons and comparison.polygraphy_passed is False:
        reasons.append(
            f"Polygraphy finds whole outputs too far from '{comparison.other}': cosine "
            f"{comparison.batch_cosine:.7f}, largest error {comparison.batch_max_error:.2e}"
        )
    return reasons


def _original_reasons(tolerance: Tolerance, comparison: Comparison | None, item: str) -> list[str]:
    """Complaints about the divergence from the original."""
    if tolerance.max_kl is None:
        return []
    if comparison is None:
        return ["its divergence cannot be judged, since the original did not run"]
    if not comparison.metrics.kl_mean <= tolerance.max_kl:
        return [
            f"KL to the original is {comparison.metrics.kl_mean:.4g} nats per {item}, "
            f"at most {tolerance.max_kl:g} is allowed"
        ]
    return []
