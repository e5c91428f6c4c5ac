"""Do two stages write the same text? Greedy decoding from the same prompts, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.runtime.sessions.session import Session

# A step of a few rows reads the weights once, as that of one does; but each row has a cache, which
# in a graph of fixed length is as long as any answer may be.
_ROWS_AT_ONCE = 4
# Draft tokens of one call: what reads the weights once costs little more than a single step.
_DRAFT_TOKENS = 15


@dataclass(frozen=True)
class GreedyTrace:
    """Greedy decoding of one prompt.

    Attributes:
        tokens: the ids chosen, N of them.
        margins: at each step, the logit of the choice above that of the runner-up, N of them.
        gaps: for each stage it was watched against, by name, the logit of its own choice above that
            of the other's choice where the two first differ; None if they never do.
        scales: at each step, the largest absolute logit.
    """

    tokens: list[int]
    margins: list[float]
    gaps: dict[str, float | None]
    scales: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class GreedyAgreement:
    """Greedy decoding of a stage against that of another one, over P prompts of N tokens.

    Attributes:
        other: name of the other stage.
        prompts: P.
        tokens: P times N.
        identical_fraction: tokens that are the same at the same place.
        identical_prompts: prompts answered the same to the end.
        first_divergence: per prompt, the first step that differs, from 0; None if there is none.
        gap: per prompt, at that step, how much higher the stage rates its own choice than the
            other's; a tiny gap is a tie broken by rounding.
        other_margin: per prompt, at that step, how sure the other stage was of its choice.
        relative_gap: per prompt, the greater of the two in parts of the largest logit there.
    """

    other: str
    prompts: int
    tokens: int
    identical_fraction: float
    identical_prompts: int
    first_divergence: list[int | None]
    gap: list[float | None]
    other_margin: list[float | None]
    relative_gap: list[float | None] = field(default_factory=list)

    @classmethod
    def of(
        cls, other: str, own: Sequence[GreedyTrace], others: Sequence[GreedyTrace]
    ) -> GreedyAgreement:
        """Summarise the traces of a stage against those of the stage named `other`.

        Args:
            other: name of the other stage.
            own: traces of the stage, made with `others` watched under that name.
            others: traces of the other stage, for the same prompts.
        """
        first = [_first_difference(a.tokens, b.tokens) for a, b in zip(own, others, strict=True)]
        total = sum(len(trace.tokens) for trace in own)
        same = sum(
            a == b
            for mine, theirs in zip(own, others, strict=True)
            for a, b in zip(mine.tokens, theirs.tokens, strict=True)
        )
        return cls(
            other=other,
            prompts=len(own),
            tokens=total,
            identical_fraction=same / total,
            identical_prompts=first.count(None),
            first_divergence=first,
            gap=[trace.gaps[other] for trace in own],
            other_margin=[
                None if step is None else trace.margins[step]
                for trace, step in zip(others, first, strict=True)
            ],
            relative_gap=[
                None if step is None else _relative_gap(mine, theirs, other, step)
                for mine, theirs, step in zip(own, others, first, strict=True)
            ],
        )

    def complaints(self, most: float) -> list[str]:
        """Say which answers part at a token that is no tie, if any; NaN is none.

        Args:
            most: relative gap up to which it is one.
        """
        wrong = [
            number
            for number, gap in enumerate(self.relative_gap)
            if gap is not None and not gap <= most
        ]
        if not wrong:
            return []
        worst = max(self.relative_gap[number] or 0.0 for number in wrong)
        step = self.first_divergence[wrong[0]]
        return [
            f"{len(wrong)} of {self.prompts} greedy answers part from those of '{self.other}' "
            f"where there is no tie, the first after {step} tokens: by {worst:.1e} of the largest "
            f"logit, at most {most:.0e} is one"
        ]


def trace_greedy(
    session: Session,
    prompts: np.ndarray,
    max_new_tokens: int,
    watched: Mapping[str, Sequence[GreedyTrace]],
) -> list[GreedyTrace]:
    """Decode every prompt greedily, without stopping early; several at once.

    Args:
        session: any backend.
        prompts: int64 [P, S].
        max_new_tokens: N, tokens per prompt.
        watched: by name of each stage to be compared with later, its traces of the same prompts.

    Raises:
        InputError: prompt and answer are longer than the session's cache.
    """
    rows = min(_ROWS_AT_ONCE, session.max_rows or _ROWS_AT_ONCE)
    traces: list[GreedyTrace] = []
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        others = {name: [trace.tokens for trace in all_[part]] for name, all_ in watched.items()}
        traces += _trace_rows(session, prompts[part], max_new_tokens, others)
    return traces


def _trace_rows(
    session: Session,
    prompts: np.ndarray,
    max_new_tokens: int,
    watched: Mapping[str, list[list[int]]],
) -> list[GreedyTrace]:
    """Decode prompts, int64 [R, S], side by side; `watched` has as many answers of each stage.

    Speculative decoding: what another stage answered is read as a block of draft tokens for as long
    as this one chose the same. The tokens are those of single steps; where an answer leaves its
    draft, what was read behind that is forgotten.
    """
    session.reset()
    traces = [GreedyTrace([], [], dict.fromkeys(watched)) for _ in prompts]
    of_row = [{name: all_[row] for name, all_ in watched.items()} for row in range(len(prompts))]
    texts = prompts
    while (done := texts.shape[1] - prompts.shape[1]) < max_new_tokens:
        # The prompt is read alone.
        count = min(_DRAFT_TOKENS, max_new_tokens - done - 1) if done else 0
        drafts = _drafts(traces, watched, count)
        fed = np.concatenate([texts[:, session.length :], drafts], axis=1)
        logits = session.forward(fed)[:, -1 - drafts.shape[1] :]  # [R, 1 + drafts, V]
        for place in range(logits.shape[1]):
            for trace, others, row in zip(traces, of_row, logits, strict=True):
                _choose(trace, row[place], others)
            new = np.array([trace.tokens[-1:] for trace in traces], dtype=np.int64)
            texts = np.concatenate([texts, new], axis=1)
            if not np.array_equal(new, drafts[:, place : place + 1]):
                break
        session.rewind(texts.shape[1] - 1)
    return traces


def _drafts(
    traces: Sequence[GreedyTrace], watched: Mapping[str, list[list[int]]], count: int
) -> np.ndarray:
    """What a stage that answered the same so far answered next, int64 [R, count].

    Without a column where no stage did for one of the rows: all rows are read in the same calls.
    """
    found: list[list[int]] = []
    for row, trace in enumerate(traces):
        done = len(trace.tokens)
        same = (all_[row] for all_ in watched.values() if all_[row][:done] == trace.tokens)
        found.append(next(same, [])[done : done + count])
    least = min(map(len, found))
    return np.array([own[:least] for own in found], dtype=np.int64).reshape(len(found), least)


def _choose(trace: GreedyTrace, logits: np.ndarray, watched: Mapping[str, list[int]]) -> None:
    """Add the likeliest token of logits [V] to a trace, and the gap where it leaves an answer."""
    token, step = int(logits.argmax()), len(trace.tokens)
    runner_up, best = np.partition(logits, -2)[-2:]
    for name, others in watched.items():
        if others[step] != token and others[:step] == trace.tokens:
            trace.gaps[name] = float(logits[token] - logits[others[step]])
    trace.tokens.append(token)
    trace.margins.append(float(best - runner_up))
    trace.scales.append(float(np.abs(logits).max()))


def _relative_gap(own: GreedyTrace, other: GreedyTrace, name: str, step: int) -> float:
    """How sure either was of its choice at a step, in parts of the largest logit of both."""
    gap, margin = own.gaps[name], other.margins[step]
    scale = max(own.scales[step], other.scales[step])
    surest = float(np.max([np.nan if gap is None else gap, margin]))
    return surest / scale if scale else 0.0


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first place where two equally long sequences differ; None if nowhere."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
