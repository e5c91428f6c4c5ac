"""What the user asks of a compression, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.compress.methods import (
    DEFAULT_EFFORT,
    DEFAULT_METHOD,
    EFFORTS,
    METHODS,
    Effort,
    Method,
)
from pipeline.errors import UsageError

SHORTENING = 4


@dataclass(frozen=True)
class CompressRequest:
    """What to compress, and how.

    Attributes:
        model: alias, hub id, folder or GGUF file.
        keep_params: fraction of the decoder's linear parameters to keep, in (0, 1].
        method: a name in METHODS.
        effort: a name in EFFORTS.
        cat: whether the method may share the right factor among matrices with the same input.
        skip: whether it may store factors in block-skip form.
        one_sided: weigh all outputs of a matrix alike, whatever the method does.
        one_shot: fit every layer to what it saw in the original model, whatever the effort is.
        mix: share of the original model's output in the targets, in [0, 1]; None for the effort's.
        rank_multiple: round ranks down to a multiple of this.
        plan: a plan.json to follow instead of making one.
        calibration: `self`, `wikitext2+c4`, or a text file.
        windows: calibration windows; None for what the effort says.
        window_length: tokens in each; None for what the effort says.
        seed: of the calibration text.
        dtype: of the weights on disk; "auto" for that of the original.
        stream_weights: leave the weights in their files, as published, even where memory has room
            for them in float32.
        trust_remote_code: let the model's own code run.
    """

    model: str
    keep_params: float = 0.8
    method: str = DEFAULT_METHOD
    effort: str = DEFAULT_EFFORT
    cat: bool = True
    skip: bool = True
    one_sided: bool = False
    one_shot: bool = False
    mix: float | None = None
    rank_multiple: int = 1
    plan: str | None = None
    calibration: str = "self"
    windows: int | None = None
    window_length: int | None = None
    seed: int = 0
    dtype: str = "auto"
    stream_weights: bool = False
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse values that cannot be meant, before any work is done.

        Raises:
            UsageError: names the value and its range.
        """
        if not 0 < self.keep_params <= 1:
            raise UsageError(
                "The kept fraction is out of range.",
                where="--keep-params",
                observed=self.keep_params,
                expected="a number in (0, 1]; 0.8 keeps 80% of the decoder's linear parameters",
            )
        if self.mix is not None and (self.one_shot or not 0 <= self.mix <= 1):
            raise UsageError(
                "There is no such mixture of targets.",
                where="--mix",
                observed="--one-shot as well" if self.one_shot else self.mix,
                expected="a number in [0, 1], without --one-shot",
            )
        for name in ("rank_multiple", "windows", "window_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    "A count must be at least 1.",
                    where="--" + name.replace("_", "-"),
                    observed=value,
                )
        for flag, value, known in (
            ("--method", self.method, METHODS),
            ("--effort", self.effort, EFFORTS),
        ):
            if value not in known:
                raise UsageError(
                    "There is no such choice.",
                    where=flag,
                    observed=value,
                    expected=", ".join(known),
                )

    @property
    def resolved_effort(self) -> Effort:
        """The effort, with the windows that were asked for in place of its own."""
        effort = EFFORTS[self.effort]
        if self.calibration == "self" and self.windows is None and self.window_length is None:
            # As many tokens in shorter windows: sampling takes a step for each token of a window.
            effort = replace(
                effort,
                windows=SHORTENING * effort.windows,
                window_length=effort.window_length // SHORTENING,
                survey_windows=SHORTENING * effort.survey_windows,
            )
        windows = self.windows or effort.windows
        return replace(
            effort,
            windows=windows,
            window_length=self.window_length or effort.window_length,
            survey_windows=min(effort.survey_windows, windows),
        )

    @property
    def resolved_method(self) -> Method:
        """The method, without what was switched off, fitted as the effort allows."""
        method = METHODS[self.method]
        fit = method.fit
        if method.allocation == "searched":
            fit = replace(fit, mix=self.resolved_effort.mix)
        if self.mix is not None:
            fit = replace(fit, mix=self.mix)
        if self.one_shot:
            fit = replace(fit, mix=None, reconstruct=False)
        if self.one_sided:
            fit = replace(fit, two_sided=False)
        return replace(method, cat=method.cat and self.cat, skip=method.skip and self.skip, fit=fit)
