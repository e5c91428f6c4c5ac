"""From logits to the next token: pure functions on one vector of logits.

Removed candidates have the logit -inf. Every filter keeps at least the likeliest token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UsageError

# Smaller temperatures overflow float64; they would choose as 0 does.
LEAST_TEMPERATURE = 1e-6
# A penalty and its inverse; beyond it there is nothing left of a logit.
MOST_PENALTY = 10.0
_FEW_CANDIDATES = 256  # which hold most of a model's probability nearly always


def _by_one_number(scores: np.ndarray, generator: np.random.Generator) -> int:
    """The token where the sum of the probabilities passes a number that is drawn from [0, 1)."""
    left = np.flatnonzero(scores > -np.inf)
    return int(left[generator.choice(left.size, p=_softmax(scores[left]))])


def _by_a_number_each(scores: np.ndarray, generator: np.random.Generator) -> int:
    """The token whose score is highest once noise is added to each, of Gumbel's distribution.

    Its law is softmax (Gumbel, 1954). As many numbers are drawn whatever was filtered out, so that
    another model's scores meet the same noise.
    """
    return int((scores + generator.gumbel(size=scores.size)).argmax())


# What a token is drawn by. A draft that guesses by the same noise is right the more often, the
# closer its scores are: by a number for each token at least (1 - TV) / (1 + TV) of the time, TV
# being the distance of the two distributions (Daliri et al., 2024); by one number less often.
UNIFORM, GUMBEL = "uniform", "gumbel"
NOISES: dict[str, Callable[[np.ndarray, np.random.Generator], int]] = {
    UNIFORM: _by_one_number,
    GUMBEL: _by_a_number_each,
}
# How far the sum of the probabilities is off at a place, in a model that is close to another; and
# the spread of the difference of two scores.
_REACH, _SPREAD = 0.1, 0.4


def _near_one_number(scores: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """What the number falls on where it is moved a little, a move being the rarer the longer."""
    sums = np.cumsum(_softmax(scores))
    edges = np.concatenate([[0.0], sums / sums[-1]])
    moves = np.clip((edges - generator.random()) / _REACH, -1.0, 1.0)
    return np.diff(0.5 + moves - 0.5 * np.sign(moves) * moves**2)  # of a triangle over -1 to 1


def _near_a_number_each(scores: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """What the highest would be if each score with its noise were moved a little."""
    return _softmax((scores + generator.gumbel(size=scores.size)) / _SPREAD)


# Scores and the noise that they meet -> what speaks for each token, float64 [V].
_NEARBY: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    UNIFORM: _near_one_number,
    GUMBEL: _near_a_number_each,
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; larger values, from 1e-6 on, flatten the
            distribution.
        top_k: keep this many candidates; 0 keeps all.
        top_p: keep the smallest set of candidates with at least this probability; 1 keeps all.
        min_p: drop candidates below this fraction of the likeliest one's probability; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that have
            occurred; 1 changes nothing. From 0.1 to 10.
        noise: what a token is drawn by, one of `NOISES`. The law is the same, the tokens of a seed
            are not; a draft guesses right more often by `gumbel`.

    Raises:
        UsageError: a value outside its range, or not finite.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    noise: str = UNIFORM

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature)
        is_warm = finite and self.temperature >= LEAST_TEMPERATURE
        ranges = {
            "temperature": (self.temperature == 0 or is_warm, f"0, or {LEAST_TEMPERATURE} and up"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 and up"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (
                1 / MOST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
                f"{1 / MOST_PENALTY} to {MOST_PENALTY:g}",
            ),
            "noise": (self.noise in NOISES, " or ".join(NOISES)),
        }
        for name, (is_valid, expected) in ranges.items():
            if not is_valid:
                observed = getattr(self, name)
                raise UsageError(f"{name} is out of range.", observed=observed, expected=expected)

    def choose(
        self,
        logits: np.ndarray,
        history: Sequence[int] | np.ndarray,
        generator: np.random.Generator,
    ) -> int:
        """Choose the next token.

        Args:
            logits: float [V].
            history: the N tokens so far, for the repetition penalty; not looked at without one.
            generator: source of randomness; not touched when the temperature is 0.

        Returns:
            A token id.
        """
        scores = self._scores(logits, history)
        if self.temperature == 0:
            return int(scores.argmax())
        return NOISES[self.noise](scores, generator)

    def rank(
        self,
        logits: np.ndarray,
        history: Sequence[int] | np.ndarray,
        generator: np.random.Generator,
        count: int,
    ) -> list[tuple[int, float]]:
        """What `choose` chooses, and what it would by logits that differ a little.

        Args:
            logits: float [V].
            history: as of `choose`.
            generator: likewise; it is left as `choose` leaves it.
            count: most tokens that are wanted.

        Returns:
            Token ids, that of `choose` first, and a weight of each, which says how much speaks for
            it by these logits and this noise: 0 to 1, no probability.
        """
        before = copy.deepcopy(generator) if count > 1 and self.temperature else generator
        chosen = self.choose(logits, history, generator)
        if count == 1:
            return [(chosen, 1.0)]
        scores, nearby = self._scores(logits, history), _NEARBY[self.noise]
        weights = nearby(scores, before) if self.temperature else _softmax(scores / _SPREAD)
        others = [int(n) for n in _likeliest(weights, count) if n != chosen and weights[n] > 0]
        return [(token, float(weights[token])) for token in [chosen, *others[: count - 1]]]

    def _scores(self, logits: np.ndarray, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is chosen by: float [V], -inf for what may not be."""
        scores = _penalise_repetition(logits, history, self.repetition_penalty)
        if self.temperature == 0:
            return scores
        scores = scores.astype(np.float64) / self.temperature
        scores = _keep_top_k(scores, self.top_k)
        scores = _keep_top_p(scores, self.top_p)
        return _keep_min_p(scores, self.min_p)


GREEDY = Sampling()


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities, float64 [V], of float [V]; -inf becomes exactly 0."""
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def _penalise_repetition(
    scores: np.ndarray, history: Sequence[int] | np.ndarray, penalty: float
) -> np.ndarray:
    """Lower the scores, float [V], of the N ids in `history`, each once (CTRL, 2019)."""
    if penalty == 1:
        return scores
    seen = np.unique(np.asarray(history, np.int64))
    result = scores.astype(np.float64)
    result[seen] = np.where(result[seen] > 0, result[seen] / penalty, result[seen] * penalty)
    return result


def _keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Keep the k highest of float [V] (all of a tie at the edge); 0 keeps all."""
    if k == 0 or k >= scores.size:
        return scores
    threshold = np.partition(scores, -k)[-k]
    return np.where(scores >= threshold, scores, -np.inf)


def _keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep the smallest set of the likeliest of float [V] with total probability at least p."""
    if p >= 1:
        return scores
    probabilities, count = _softmax(scores), _FEW_CANDIDATES
    while True:
        order = _likeliest(scores, count)
        cumulative = np.cumsum(probabilities[order])
        if cumulative[-1] >= p or order.size == scores.size:
            break
        count *= 8
    kept = order[: int(np.searchsorted(cumulative, p)) + 1]
    result = np.full_like(scores, -np.inf)
    result[kept] = scores[kept]
    return result


def _likeliest(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest of float [V] and of all that tie with the last, highest first.

    Of those that tie, the lower id comes first. Sorting a vocabulary takes longer than a step.
    """
    if count >= scores.size:
        return np.argsort(-scores, kind="stable")
    threshold = np.partition(scores, -count)[-count]
    found = np.flatnonzero(scores >= threshold)
    return found[np.argsort(-scores[found], kind="stable")]


def _keep_min_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Drop those of float [V] whose probability is below p times the largest one."""
    if p == 0:
        return scores
    return np.where(scores >= scores.max() + np.log(p), scores, -np.inf)
