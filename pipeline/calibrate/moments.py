"""Second moments, accumulated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline.calibrate.precision import fast
from pipeline.workers.workers import Done, Result

_LARGEST_NORM = 10.0
NO_TOKENS = "no tokens were accumulated"
# Columns of a sum that are added to at once.
BLOCK = 128


def _rows_of(inputs: torch.Tensor) -> torch.Tensor:
    """Vectors [t, n] of a batch of them [..., n]."""
    return inputs.reshape(-1, inputs.shape[-1])


def _add_gram_(upper: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X^T X of rows X [t, n] to the blocks on and above the diagonal of a sum [n, n].

    Products are in the type of the rows, though the forward pass that they are seen in may round
    its own: a sum rounded to bfloat16 is no second moment, for it has eigenvalues below zero.
    """
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, rows.shape[1], BLOCK):
            end = start + BLOCK
            upper[start:end, start:] += rows[:, start:end].T @ rows[:, start:]


def _whole(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of whose blocks those below the diagonal are not looked at, [n, n].

    By blocks: of the widest inputs, each copy is gigabytes.
    """
    whole = upper.clone()
    for start in range(0, len(whole), BLOCK):
        end = start + BLOCK
        whole[end:, start:end] = whole[start:end, end:].T
    return whole


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """X^T X of rows X [t, n], in their type, [n, n]."""
    upper = rows.new_zeros(rows.shape[1], rows.shape[1])
    _add_gram_(upper, rows)
    return _whole(upper)


@dataclass(frozen=True)
class SeenGroup:
    """What was seen of linears with one input, of all text.

    Attributes:
        inputs: S of the input, float32 [n, n].
        weighted: the same, tokens weighted by their gradients.
        outputs: G of what each member returns, bfloat16 [m, m].
    """

    inputs: Result[torch.Tensor]
    weighted: Result[torch.Tensor]
    outputs: tuple[Result[torch.Tensor], ...]


class _Mean:
    """A running sum over tokens of products of a vector with itself."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._upper, self.tokens = torch.zeros(width, width, dtype=dtype), 0

    @property
    def total(self) -> torch.Tensor:
        """The sum, in its type, [n, n]."""
        return _whole(self._upper)

    def mean(self) -> torch.Tensor:
        """The sum divided by the tokens, in its type, [n, n].

        Raises:
            ValueError: no token was added.
        """
        if self.tokens == 0:
            raise ValueError(NO_TOKENS)
        return self.total.div_(self.tokens)


class SecondMoment(_Mean):
    """Running S = sum over tokens of x x^T, for one input of width n.

    Products are taken in float32, where the matrix units are, and summed in float64, so that the
    number of batches does not add to the error.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, torch.float64)

    def add_(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs, float [..., n].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows = finite_rows(inputs)
        _add_gram_(self._upper, rows)
        self.tokens += rows.shape[0]


def finite_rows(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs float32 [t, n] of a batch [..., n].

    Raises:
        ValueError: NaN or infinite values.
    """
    rows = _rows_of(inputs).float()
    if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
        raise ValueError("NaN or infinite activations")
    return rows


class Drift(_Mean):
    """Running sum over tokens of (x - x') x'^T, for two inputs of width n.

    The distance is small beside x', so that its product may be taken in bfloat16.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, torch.float64)

    @property
    def total(self) -> torch.Tensor:
        return self._upper

    def add_(self, original: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add a batch of x, float [t, n], and of x', float32 [t, n]."""
        distance, other = fast(original.float() - inputs), fast(inputs)
        for start in range(0, len(self._upper), BLOCK):
            self._upper[start : start + BLOCK] += distance[:, start : start + BLOCK].T @ other
        self.tokens += len(inputs)


def _rows_and_squares(gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients float32 [t, m] of a batch [..., m], and their squared lengths [t].

    Raises:
        ValueError: NaN or infinite values.
    """
    rows = _rows_of(gradients.detach()).float()
    squares = rows.square().sum(dim=1)
    if not torch.isfinite(squares).all():
        raise ValueError("NaN or infinite gradients")
    return rows, squares


def cut_gradients(gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a batch [..., m], none longer than all others together would make it.

    A few tokens have gradients hundreds of times larger than the rest and would decide alone: a
    gradient longer than LARGEST_NORM times the root mean square of its batch is cut to that length.

    Returns:
        Float [t, m], rounded to bfloat16 where that is faster, since G is only ever used shrunk.
        Their squared lengths after the cut, as fractions of the mean, float32 [t].

    Raises:
        ValueError: NaN or infinite values.
    """
    rows, squares = _rows_and_squares(gradients)
    limit = _LARGEST_NORM**2 * squares.mean()
    cut = (limit / squares.clamp_min(1e-30)).clamp_max(1)
    weights = squares * cut / squares.mean().clamp_min(1e-30)
    return fast(rows * cut.sqrt()[:, None]), weights


class _OutputMoment(_Mean):
    """Running G = sum over tokens of g g^T, for the gradient by one output of height m."""

    def __init__(self, height: int) -> None:
        super().__init__(height, torch.float32)

    @torch.no_grad()
    def add_(self, gradients: torch.Tensor) -> torch.Tensor:
        """Add a batch of gradients, float [..., m].

        Returns:
            Their squared lengths after the cut, as fractions of the mean, float32 [tokens].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows, weights = cut_gradients(gradients)
        _add_gram_(self._upper, rows)
        self.tokens += rows.shape[0]
        return weights


class _Watched:
    """Linears that read the same input, by name, whose input and gradients are seen."""

    def __init__(self, width: int, heights: dict[str, int]) -> None:
        self.inputs, self.members = SecondMoment(width), tuple(heights)
        self._rows = torch.empty(0, width)

    def see_input(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs, float [..., n]; its gradients follow before the next batch.

        Raises:
            ValueError: NaN or infinite values.
        """
        self._rows = _rows_of(inputs.detach()).float()
        self.inputs.add_(self._rows)


class GroupMoments(_Watched):
    """Moments of a group of linears that read the same input, over batches run forward and back.

    Attributes:
        inputs: S of the input.
        weighted: the same, each token weighted by the squared gradient at the group's outputs.
        outputs: linear -> G of the gradient by what it returns.
    """

    def __init__(self, width: int, heights: dict[str, int]) -> None:
        super().__init__(width, heights)
        self.weighted = SecondMoment(width)
        self.outputs = {name: _OutputMoment(height) for name, height in heights.items()}
        self._weights: list[torch.Tensor] = []

    def see_gradient(self, name: str, gradients: torch.Tensor) -> None:
        """Add the gradients by the output of one member, float [..., m].

        Raises:
            ValueError: NaN or infinite values.
        """
        self._weights.append(self.outputs[name].add_(gradients))
        if len(self._weights) == len(self.outputs):
            weights = torch.stack(self._weights).mean(dim=0)
            self.weighted.add_(self._rows * weights.sqrt()[:, None])
            self._rows, self._weights = torch.empty(0), []

    def seen(self) -> SeenGroup:
        """The means, as they are handed on."""
        return SeenGroup(
            Done(self.inputs.mean().float()),
            Done(self.weighted.mean().float()),
            tuple(Done(output.mean().bfloat16()) for output in self.outputs.values()),
        )


class OutputMoments:
    """Moments of what a module returns, over batches run forward and back.

    They are of what is left behind the mean of the first batch: most of keys is their mean, and
    float32 products of the whole would leave nothing but rounding of what varies least.

    Args:
        width: n, numbers that it returns for a token.

    Attributes:
        gradients: G of the gradient by what it returns.
    """

    def __init__(self, width: int) -> None:
        self.gradients = _OutputMoment(width)
        self._starts, self._sequences = torch.zeros(width, dtype=torch.float64), 0
        self._plain, self._weighted = SecondMoment(width + 1), SecondMoment(width + 1)
        self._rows = torch.empty(0, width + 1)
        self._origin: torch.Tensor | None = None

    def see_output(self, outputs: torch.Tensor) -> None:
        """Add a batch of outputs, float [B, S, n]; its gradients follow before the next batch.

        Raises:
            ValueError: NaN or infinite values.
        """
        rows = _rows_of(outputs.detach()).float()
        self._starts += outputs.detach()[:, 0].double().sum(0)
        self._sequences += len(outputs)
        if self._origin is None:
            self._origin = rows.double().mean(0).float()
        self._rows = torch.cat([rows - self._origin, torch.ones(len(rows), 1)], dim=1)
        self._plain.add_(self._rows)

    def see_gradient(self, gradients: torch.Tensor) -> None:
        """Add the gradients by the last batch, float [..., n].

        Raises:
            ValueError: NaN or infinite values.
        """
        weights = self.gradients.add_(gradients)
        self._weighted.add_(self._rows * weights.sqrt()[:, None])

    def start(self) -> torch.Tensor:
        """Mean of what is returned for the first token of a sequence, float64 [n]."""
        return self._starts / max(1, self._sequences)

    def centred(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """E[(y - m)(y - m)^T] and the same with tokens weighted by their gradients; m = E[y].

        Returns:
            Float64 [n, n]; float64 [n, n], in which gradients count for a half (see `Balanced`);
            float64 [n].
        """
        plain = self._plain.mean()
        mean = plain[-1, :-1]
        moment = _about(plain, mean)
        assert self._origin is not None, "a mean of nothing was refused"
        whole = self._origin.double() + mean
        return moment, Balanced(moment, _about(self._weighted.mean(), mean)).double(), whole


def _about(moment: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """E[w (y - m)(y - m)^T] from E[w (y, 1)(y, 1)^T], float64 [n, n]."""
    cross = torch.outer(moment[:-1, -1], mean)
    return moment[:-1, :-1] - cross - cross.T + moment[-1, -1] * torch.outer(mean, mean)


class DrawnMoments(_Watched):
    """Moments of a group of linears, of a model of whose outputs several are drawn for each input.

    Nothing is cut: the few draws that differ from what is almost sure carry most of the gradient.

    Attributes:
        inputs: S of the input.
        weighted: the sum of x x^T, each input weighted by its squared gradient; float32 [n, n].
        outputs: member -> sum of g g^T over all draws, float32 [m, m].
    """

    def __init__(self, width: int, heights: dict[str, int]) -> None:
        super().__init__(width, heights)
        self.weighted = torch.zeros(width, width)
        self.outputs = {name: torch.zeros(height, height) for name, height in heights.items()}
        self._squares: list[torch.Tensor] = []

    def see_gradient(self, member: str, gradients: torch.Tensor) -> None:
        """Add the gradients by a member's output for one draw, float [..., m].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows, squares = _rows_and_squares(gradients)
        self.outputs[member] += _gram(rows)
        self._squares.append(squares)
        if len(self._squares) == len(self.outputs):
            weights = torch.stack(self._squares).mean(dim=0)
            self.weighted += _gram(self._rows * weights.sqrt()[:, None])
            self._squares = []


@dataclass(frozen=True)
class Balanced:
    """The mean of a second moment and its gradient-weighted form, brought to the same trace.

    The nearest Kronecker product to the Fisher information weights the tokens; the plain moment is
    estimated with less variance, and holds for text on which other tokens matter. Tokens that carry
    huge activations and no gradient, such as attention sinks, count for half.

    Nothing is held but the rows that are asked for: of the widest inputs all take gigabytes.

    Attributes:
        seen: S, float [n, n].
        weighted: S with weighted tokens, float [n, n].
    """

    seen: torch.Tensor
    weighted: torch.Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        found = self.weighted[rows].to(torch.float64, copy=True)
        return found.mul_(self._scale).add_(self.seen[rows]).div_(2)

    def double(self) -> torch.Tensor:
        """All of it, float64 [n, n]."""
        return self[:]

    @cached_property
    def _scale(self) -> torch.Tensor:
        traces = [part.diagonal().double().sum() for part in (self.seen, self.weighted)]
        return traces[0] / traces[1].clamp_min(1e-300)
