"""Which tree of draft tokens is grown: against all others, where there are few."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.draft_tree import (
    Draft,
    TreeGrowth,
    branches_of,
    child_of,
    depths_of,
    is_leaf,
    parents_in_block,
    path_of,
)

# Guesses at each place of the trees below, and how deep they are.
WIDTH, DEPTH = 2, 3


def odds_of(seed: int, path: Sequence[int]) -> list[float]:
    """Of the guesses behind a path of guesses: they sum up to less than one, the first is first."""
    random = np.random.default_rng([seed, *(1 + n for n in path)])
    return sorted((random.dirichlet([2.0] + [1.0] * WIDTH)[:WIDTH]).tolist(), reverse=True)


def grown(
    seed: int, rows: int, depth: int = DEPTH, share: float = 0.0, branch: float = 0.0
) -> tuple[TreeGrowth, int]:
    """A tree whose tokens are ranks, and the steps that were made for it."""
    growth, steps = TreeGrowth(rows, depth, 1.0, share, branch), 0
    while (node := growth.next_step()) is not None:
        steps += 1
        odds = odds_of(seed, [growth.tokens[n] for n in growth.path(node)])
        growth.add(node, list(enumerate(odds)), [(rank, p) for rank, p in enumerate(odds)])
    return growth, steps


def expected_tokens(seed: int, paths: set[tuple[int, ...]]) -> float:
    """What a call with the rows of these guesses gives, behind its own token."""
    return sum(
        float(np.prod([odds_of(seed, path[:n])[path[n]] for n in range(len(path))]))
        for path in paths
    )


def paths_in(draft: Draft) -> set[tuple[int, ...]]:
    found = set()
    for branch in branches_of(draft.parents):
        found |= {tuple(draft[n] for n in branch[: 1 + k]) for k in range(len(branch))}
    return found


def all_trees(rows: int) -> Iterator[set[tuple[int, ...]]]:
    """Every tree of so many rows that holds the parent of each of its guesses."""
    places = [p for n in range(DEPTH) for p in itertools.product(range(WIDTH), repeat=n + 1)]
    for tree in itertools.combinations(places, rows):
        if all(len(path) == 1 or path[:-1] in tree for path in tree):
            yield set(tree)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("seed", range(6))
def test_the_tree_is_the_best_of_all_of_as_many_rows(rows: int, seed: int) -> None:
    growth, _ = grown(seed, rows)
    found = paths_in(growth.draft())
    assert len(found) == len(growth.draft()) == rows
    best = max(expected_tokens(seed, tree) for tree in all_trees(rows))
    assert expected_tokens(seed, found) == pytest.approx(best, abs=1e-12)


def test_a_step_is_made_only_where_it_gives_more_than_its_time() -> None:
    # Behind a sure guess another is sure: the first of these is worth less than a step's time.
    steps = [grown(3, 6, share=share)[1] for share in (0.0, 0.05, 0.2, 0.9)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1] == 1
    dear = grown(3, 6, share=0.9)[0].draft()
    assert len(dear) == WIDTH  # what that step has guessed costs no further one


def test_a_branch_is_grown_only_where_it_gives_more_than_its_time() -> None:
    for seed in range(6):
        counts = [
            len(branches_of(grown(seed, 6, branch=share)[0].draft().parents))
            for share in (0.0, 0.02, 0.1, 0.3, 1.0)
        ]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] == 1
        least = expected_tokens(seed, paths_in(grown(seed, 6, branch=0.1)[0].draft()))
        assert least >= expected_tokens(seed, paths_in(grown(seed, 6, branch=1.0)[0].draft()))


def test_where_all_is_right_a_chain_is_grown() -> None:
    growth = TreeGrowth(9, 99, 1.0, 0.02)
    while (node := growth.next_step()) is not None:
        growth.add(node, [(5, 0.999), (6, 0.001)], [(0, 0.999), (1, 0.001)])
    draft = growth.draft()
    assert draft == (5,) * 9
    assert parents_in_block(draft) is None


def test_it_is_no_deeper_than_may_be() -> None:
    for depth in range(3):
        draft = grown(1, 6, depth)[0].draft()
        assert max(depths_of(draft.parents), default=-1) == depth - 1


def test_what_a_step_has_to_read_again_is_what_another_branch_wrote_over() -> None:
    growth = TreeGrowth(9, 9, 1.0)
    assert growth.next_step() == -1
    growth.add(-1, [(1, 0.6), (2, 0.4)], [(0, 0.6), (1, 0.4)])
    assert growth.unread(0) == (0, [0])
    growth.add(0, [(3, 0.9), (4, 0.1)], [(0, 0.9), (1, 0.1)])
    assert growth.unread(2) == (1, [2])
    growth.add(2, [(5, 0.9)], [(0, 0.9)])
    assert growth.unread(1) == (0, [1])
    growth.add(1, [(6, 0.9)], [(0, 0.9)])
    assert growth.unread(4) == (0, [0, 2, 4])
    draft = growth.draft()
    assert list(draft) == [1, 3, 5, 4, 2, 6]
    assert draft.parents == (-1, 0, 1, 0, -1, 4)


def test_a_chosen_path_is_followed_down_the_tree() -> None:
    draft = Draft([1, 3, 5, 4, 2, 6], [-1, 0, 1, 0, -1, 4])
    assert path_of(draft, [2, 6, 9]) == [4, 5]
    assert path_of(draft, [1, 4, 9]) == [0, 3]
    assert path_of(draft, [1, 9]) == [0]
    assert path_of(draft, [9]) == path_of(draft, []) == []
    assert path_of([7, 8], [7, 8, 9]) == [0, 1]
    assert child_of(draft, 0, 4) == 3
    assert child_of(draft, -1, None) is None
    assert is_leaf(draft, 2)
    assert not is_leaf(draft, 0)
    assert is_leaf([], -1)
    assert parents_in_block(draft) == (-1, 0, 1, 2, 1, 0, 5)
    assert parents_in_block([7, 8]) is None
    assert branches_of(draft.parents) == [[0, 1, 2], [0, 3], [4, 5]]


@given(st.integers(0, 50), st.integers(1, 6))
def test_the_first_branch_comes_first_and_in_one_piece(seed: int, rows: int) -> None:
    draft = grown(seed, rows)[0].draft()
    branches = branches_of(draft.parents)
    assert branches[0] == list(range(len(branches[0])))
    assert all(parent < n for n, parent in enumerate(draft.parents))
    assert sorted({n for branch in branches for n in branch}) == list(range(len(draft)))
