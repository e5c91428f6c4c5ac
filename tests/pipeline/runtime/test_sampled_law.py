"""What is sampled has the law of the undrafted model, whatever drafts and by whichever noise.

All sequences of three tokens are enumerated, and a G-test holds how often each was said against the
product of the model's own probabilities.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.special
import scipy.stats

from pipeline.runtime.draft_tree import Draft, TreeGrowth, parents_in_block, path_of
from pipeline.runtime.drafting import Chooser, Drafter
from pipeline.runtime.sampling import GUMBEL, UNIFORM, Sampling
from pipeline.runtime.sequence import Decoding, RunningAnswer

DEPTH = 3
# Outcomes, and draws: some dozens for each.
FEW, MANY = (3, 2_000), (16, 200_000)
LEAST_P, FEWEST = 1e-3, 5
# Rows for the last token and the draft tokens -> those that the answer is to choose from.
_Rule = Callable[[list[np.ndarray], Sequence[int]], list[np.ndarray]]


@dataclass(frozen=True)
class Model:
    """Logits that depend on all tokens so far."""

    size: int
    seed: int

    def logits(self, said: Sequence[int]) -> np.ndarray:
        """Float32 [V]; the same for the same tokens."""
        place = sum((token + 1) * (self.size + 1) ** n for n, token in enumerate(said))
        own = np.random.default_rng([self.seed, place])
        return own.normal(size=self.size).astype(np.float32)


class Table:
    """The same of two models, kept: they agree in part, as a model and its draft do."""

    def __init__(self, size: int) -> None:
        both = Model(size, 0), Model(size, 1)
        self.size = size
        self.target: dict[tuple[int, ...], np.ndarray] = {}
        self.draft: dict[tuple[int, ...], np.ndarray] = {}
        for depth in range(DEPTH):
            for said in itertools.product(range(size), repeat=depth):
                one, other = (model.logits(said) for model in both)
                self.target[said], self.draft[said] = one, one + 0.5 * other

    def law(self) -> np.ndarray:
        """Probability of each sequence of three tokens, float64 [V ** 3]."""
        found = []
        for said in itertools.product(range(self.size), repeat=DEPTH):
            logs = [
                scipy.special.log_softmax(self.target[said[:n]].astype(np.float64))[token]
                for n, token in enumerate(said)
            ]
            found.append(np.exp(sum(logs)))
        return np.array(found)


class Guessing(Drafter):
    """Drafts by the draft's logits, with the noise of the answer or with its own.

    With a width a tree of all guesses that rank so high.
    """

    def __init__(self, table: Table, own: np.random.Generator | None, width: int = 1) -> None:
        self.drafted = self.taken = 0
        self.width = width
        self.table, self.own, self.said = table, own, list[int]()

    def guess_by(self, begin: Callable[[], Chooser]) -> None:
        self.begin = begin

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        self.taken += len(path_of(drafted, chosen))
        self.said += chosen

    def tree(self, most: int) -> Draft:
        growth = TreeGrowth(16, most, 1.0)
        choosers: dict[int, Chooser] = {}
        while (node := growth.next_step()) is not None:
            path = [growth.tokens[n] for n in growth.path(node)]
            before = None if node < 0 else choosers[growth.parents[node]]
            choosers[node] = self.begin() if before is None else before.behind(path[-1])
            logits = self.table.draft[tuple(self.said[1:] + path)]
            found = choosers[node].rank(logits, self.width)
            growth.add(node, found, [(0, 1.0)] * len(found))
        return growth.draft()

    def draft(self, most: int) -> Sequence[int]:
        if self.width > 1:
            tree = self.tree(most)
            self.drafted += len(tree)
            return tree
        choose, own = self.begin(), self.own
        found: list[int] = []
        while len(found) < most:
            logits = self.table.draft[tuple(self.said[1:] + found)]
            guess = choose(logits) if own is None else Sampling(1.0).choose(logits, (), own)
            assert guess is not None
            found.append(guess)
        self.drafted += len(found)
        return found


def right_rule(rows: list[np.ndarray], drafted: Sequence[int]) -> list[np.ndarray]:
    return rows


def wrong_rule(rows: list[np.ndarray], drafted: Sequence[int]) -> list[np.ndarray]:
    """Keeps whatever the draft has drawn."""
    for row, token in zip(rows, drafted, strict=False):
        row[:] = np.where(np.arange(len(row)) == token, 0.0, -np.inf)
    return rows


def say(
    table: Table,
    noise: str,
    drafter: Guessing | None,
    generator: np.random.Generator,
    rule: _Rule,
) -> tuple[int, ...]:
    """One answer of three tokens behind a prompt of one, of which the draft knows the first."""
    decoding = Decoding(DEPTH, Sampling(1.0, noise=noise), seed=generator)
    running = RunningAnswer([0], decoding, 9, drafter=drafter)
    running.take([table.target[()]])
    while running.ending is None:
        drafted = running.draft()
        said = tuple(running.ids)
        parents = parents_in_block(drafted) or range(-1, len(drafted))
        behind = [said]
        for token, parent in zip(drafted, parents[1:], strict=True):
            behind.append((*behind[parent], token))
        rows = [table.target[path].copy() for path in behind]
        running.take(rule(rows, drafted), drafted)
    return tuple(running.ids)


def held_to_its_law(
    size: int, draws: int, noise: str, drafts: str, rule: _Rule
) -> tuple[float, float]:
    """The p of the G-test, and the share of draft tokens that were accepted."""
    table, generator = Table(size), np.random.default_rng(0)
    own = np.random.default_rng(1) if drafts == "uncoupled" else None
    counts: Counter[tuple[int, ...]] = Counter()
    drafted = taken = 0
    for _ in range(draws):
        width = 3 if drafts == "tree" else 1
        drafter = None if drafts == "none" else Guessing(table, own, width)
        counts[say(table, noise, drafter, generator, rule)] += 1
        if drafter is not None:
            drafted += drafter.drafted
            taken += drafter.taken
    seen = np.array([counts[said] for said in itertools.product(range(size), repeat=DEPTH)])
    expected = draws * table.law()
    rare = expected < FEWEST  # the test's own law is one of many draws: they count as one outcome
    pooled = [np.append(n[~rare], n[rare].sum()) for n in (seen, expected)]
    result = scipy.stats.power_divergence(*pooled, lambda_="log-likelihood")
    return float(result.pvalue), taken / max(1, drafted)


@pytest.mark.parametrize("noise", [UNIFORM, GUMBEL])
@pytest.mark.parametrize("drafts", ["none", "uncoupled", "coupled", "tree"])
@pytest.mark.parametrize("sizes", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_the_sampled_law_is_the_models_own(sizes: tuple[int, int], drafts: str, noise: str) -> None:
    p, accepted = held_to_its_law(*sizes, noise, drafts, right_rule)
    assert p > LEAST_P
    assert (accepted > 0.05) == (drafts != "none")


@pytest.mark.parametrize("sizes", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_rule_that_keeps_the_drafts_own_tokens_fails_the_same_test(
    sizes: tuple[int, int],
) -> None:
    p, accepted = held_to_its_law(*sizes, UNIFORM, "uncoupled", wrong_rule)
    assert p < LEAST_P / 1000
    assert accepted == 1


@pytest.mark.parametrize("noise", [UNIFORM, GUMBEL])
def test_a_tree_has_more_of_what_is_sampled_than_a_chain(noise: str) -> None:
    table = Table(9)
    tokens = {}
    for width in (1, 3):
        generator, said = np.random.default_rng(0), list[int]()
        for _ in range(300):
            drafter = Guessing(table, None, width)
            say(table, noise, drafter, generator, right_rule)
            said.append(drafter.taken)
        tokens[width] = sum(said)
    assert tokens[3] > 1.1 * tokens[1]
