"""Draft tokens that branch: which stand behind which, and which tree of them is worth most.

A tree is written as each token's parent: the number of the token that it stands behind, -1 for none
of them. Parents come before their children, and the first branch comes first, in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence


class Draft(tuple[int, ...]):
    """Draft tokens behind the last token of an answer; other sequences of tokens are chains.

    Attributes:
        parents: the number of the token that each stands behind, -1 for the answer's last.
    """

    parents: tuple[int, ...]

    def __new__(cls, tokens: Sequence[int], parents: Sequence[int]) -> Draft:
        """Tokens with their parents."""
        made = super().__new__(cls, tokens)
        made.parents = tuple(parents)
        return made


def _branching(drafted: Sequence[int]) -> tuple[int, ...] | None:
    """Parents of draft tokens; None where they stand one behind another."""
    if not isinstance(drafted, Draft) or drafted.parents == tuple(range(-1, len(drafted) - 1)):
        return None
    return drafted.parents


def parents_in_block(drafted: Sequence[int]) -> tuple[int, ...] | None:
    """The same behind the token that is read beside them, which is then the first; or None."""
    parents = _branching(drafted)
    return None if parents is None else (-1, *(1 + parent for parent in parents))


def child_of(drafted: Sequence[int], node: int, token: int | None) -> int | None:
    """The number of the draft token that stands behind another (-1: the last) and is a token."""
    parents = _branching(drafted) or range(-1, len(drafted) - 1)
    found = (n for n in range(node + 1, len(drafted)) if parents[n] == node and drafted[n] == token)
    return next(found, None)


def path_of(drafted: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Numbers of the draft tokens that came, as far as they did."""
    path: list[int] = []
    node = -1
    for token in chosen:
        found = child_of(drafted, node, token)
        if found is None:
            break
        path.append(node := found)
    return path


def is_leaf(drafted: Sequence[int], node: int) -> bool:
    """Whether nothing was drafted behind a draft token, or, -1, behind the answer's last."""
    parents = _branching(drafted) or range(-1, len(drafted) - 1)
    return node not in parents


def depths_of(parents: Sequence[int]) -> list[int]:
    """Of each node, how many there are before it."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def branches_of(parents: Sequence[int]) -> list[list[int]]:
    """The nodes from the first to each leaf; of the first leaf first."""
    inner = set(parents)
    found = []
    for leaf in (n for n in range(len(parents)) if n not in inner):
        branch, node = [leaf], parents[leaf]
        while node >= 0:
            branch.append(node)
            node = parents[node]
        found.append(branch[::-1])
    return found


class TreeGrowth:
    """A tree of draft tokens, which grows where a further step of the draft gives most.

    Each guess that is known has a probability of being reached and right, the product of those on
    its way. A call gives one token and as many as these sum up to over its rows, so the best rows
    are the likeliest guesses, of branches that are worth their time. The next step is behind the
    one that is likeliest for the tokens that the draft has to read for it, as long as it gives
    more than its time would elsewhere.

    Args:
        rows: most draft tokens of the tree.
        depth: most of them one behind another.
        first: how often the likeliest guess behind another is right, 0 to 1.
        step_share: time of a step of the draft as a share of a call's; 0 counts rows alone.
        branch_share: likewise, of another branch in a call.

    Attributes:
        tokens: of all guesses that are known; the best are drafted.
        parents: of each.
        odds: probability that it is reached and right.
        sources: what else is known of each: its rank among its siblings, and how sure it was.
    """

    def __init__(
        self,
        rows: int,
        depth: int,
        first: float,
        step_share: float = 0.0,
        branch_share: float = 0.0,
    ) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.odds: list[float] = []
        self.sources: list[tuple[int, float]] = []
        self._rows, self._depth, self._first = rows, depth, first
        self._step_share, self._branch_share = step_share, branch_share
        self._depths: list[int] = []
        self._likeliest: set[int] = set()  # which stand behind a branch, and begin none
        self._steps = 0
        self._stepped: set[int] = set()
        self._held: list[int] = []  # what the draft has read, behind the answer's last token

    def add(
        self,
        parent: int,
        guesses: Sequence[tuple[int, float]],
        sources: Sequence[tuple[int, float]],
    ) -> None:
        """What a step of the draft has guessed.

        Args:
            parent: the guess it was made behind, or -1.
            guesses: tokens, and how likely each is to be right.
            sources: as of the attribute.
        """
        self._steps += 1
        self._stepped.add(parent)
        self._held = self.path(parent)
        before = 1.0 if parent < 0 else self.odds[parent]
        depth = 1 if parent < 0 else self._depths[parent] + 1
        if guesses:
            best = max(range(len(guesses)), key=lambda n: guesses[n][1])
            self._likeliest.add(len(self.tokens) + best)
        for (token, odds), source in zip(guesses, sources, strict=True):
            self.tokens.append(token)
            self.parents.append(parent)
            self.odds.append(before * min(1.0, odds))
            self.sources.append(source)
            self._depths.append(depth)

    def path(self, node: int) -> list[int]:
        """The guesses from the first to one of them."""
        found: list[int] = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def next_step(self) -> int | None:
        """The guess to make a step behind, -1 for the answer's last token; None for no further."""
        if not self._stepped:
            return -1 if min(self._rows, self._depth) > 0 else None
        worthy = self._worthy()
        best = self._best_rows(worthy)
        displaced = min(self.odds[n] for n in best) if len(best) == self._rows else 0.0
        least, branch = self._rate() * self._step_share, self._rate() * self._branch_share
        worth: dict[int, float] = {}
        for n, odds in enumerate(self.odds):
            if n in self._stepped or self._depths[n] >= self._depth:
                continue
            gain = odds * self._first - displaced
            if n not in worthy:  # the branch would come with it
                gain += odds - branch
            if gain > least:
                worth[n] = gain / max(1, len(self.unread(n)[1]))
        found = max(worth, key=lambda n: worth[n], default=None)
        return found if found is not None and worth[found] > least else None

    def unread(self, node: int) -> tuple[int, list[int]]:
        """How much of what the draft has read stays for a step, and the guesses it is to read."""
        path = self.path(node)
        kept = 0
        while kept < min(len(path), len(self._held)) and path[kept] == self._held[kept]:
            kept += 1
        return kept, path[kept:]

    def draft(self) -> Draft:
        """The best rows, a branch after the other, at each fork the likelier first."""
        best = set(self._best_rows(self._worthy()))
        order: list[int] = []
        open_nodes = [-1]
        while open_nodes:
            node = open_nodes.pop()
            if node >= 0:
                order.append(node)
            own = [n for n in best if self.parents[n] == node]
            open_nodes += sorted(own, key=lambda n: (self.odds[n], -n))
        number = {node: n for n, node in enumerate(order)} | {-1: -1}
        return Draft([self.tokens[n] for n in order], [number[self.parents[n]] for n in order])

    def _rate(self) -> float:
        """Tokens for the time of a call, as things are."""
        best = sorted(self.odds, reverse=True)[: self._rows]
        return (1 + sum(best)) / (1 + self._steps * self._step_share)

    def _worthy(self) -> set[int]:
        """Guesses of branches that give more tokens than their time would elsewhere."""
        least, sums = self._rate() * self._branch_share, self.odds.copy()
        for n in reversed(range(len(sums))):  # children come before their parents
            if self.parents[n] >= 0 and (n in self._likeliest or sums[n] >= least):
                sums[self.parents[n]] += sums[n]
        found: set[int] = set()
        for n, parent in enumerate(self.parents):
            if (parent < 0 or parent in found) and (n in self._likeliest or sums[n] >= least):
                found.add(n)
        return found

    def _best_rows(self, worthy: set[int]) -> list[int]:
        """The likeliest of some guesses: a parent is among them before its children are."""
        return sorted(worthy, key=lambda n: (-self.odds[n], n))[: self._rows]
