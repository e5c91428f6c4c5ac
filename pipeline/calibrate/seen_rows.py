"""What `GroupMoments` sums, batch by batch where it is seen and sum by sum where it is added.

Each block of a sum is made of all batches, in their order, before the next is begun: the bytes are
those of the sums that grow batch by batch, and no float64 matrix is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from pipeline.calibrate.moments import BLOCK, NO_TOKENS, cut_gradients, finite_rows
from pipeline.calibrate.precision import fast, quick_float32

# Of libraries, and of a heap that keeps what is freed.
_SMALL_BYTES = 1 << 27


class SeenRows:
    """What passes through linears that read the same input, of one batch.

    Args:
        width: n of the input.
        heights: m of what each member returns, by its name.
    """

    def __init__(self, width: int, heights: dict[str, int]) -> None:
        self.members = tuple(heights)
        self._inputs, self._weights = [torch.empty(0, width)], [torch.empty(0)]
        self._outputs = {name: [torch.empty(0, height)] for name, height in heights.items()}
        self._lengths: list[torch.Tensor] = []

    def see_input(self, inputs: torch.Tensor) -> None:
        """Add inputs, float [..., n]; their gradients follow before the next.

        Raises:
            ValueError: NaN or infinite values.
        """
        self._inputs.append(finite_rows(inputs.detach()))

    def see_gradient(self, name: str, gradients: torch.Tensor) -> None:
        """Add the gradients by the output of one member, float [..., m].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows, lengths = cut_gradients(gradients)
        self._outputs[name].append(rows)
        self._lengths.append(lengths)
        if len(self._lengths) == len(self._outputs):
            self._weights.append(torch.stack(self._lengths).mean(dim=0))
            self._lengths = []

    def inputs(self) -> torch.Tensor:
        """X, float32 [t, n]."""
        return _joined(self._inputs)

    def parts(self) -> list[torch.Tensor]:
        """X, its weights float32 [t], and g of each member, float [t, m]."""
        return [self.inputs(), _joined(self._weights), *map(_joined, self._outputs.values())]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor; the first of them is empty, and perhaps of another type."""
    return parts[1] if len(parts) == 2 else torch.cat(parts[1:] or parts)


def mean_input_moment(*rows: torch.Tensor) -> torch.Tensor:
    """E[x x^T] of batches X [t, n], float32 [n, n]: `SecondMoment`'s, rounded.

    Raises:
        ValueError: no tokens.
    """
    return _mean_gram(rows, [partial(_columns, x=x) for x in rows], torch.float64, torch.float32)


def mean_weighted_moment(*rows_and_weights: torch.Tensor) -> torch.Tensor:
    """E[w x x^T] of batches X [t, n] and then their weights [t], float32 [n, n].

    Raises:
        ValueError: no tokens.
    """
    rows, weights = _halves(rows_and_weights)
    # As wide as the whole: what a product rounds may depend on where its rows lie.
    room = torch.empty(max(map(len, rows)), rows[0].shape[1])

    def weighted(start: int, x: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        return torch.mul(x[:, start:], root, out=room[: len(x), start:])

    roots = [one.sqrt()[:, None] for one in weights]
    columns = [partial(weighted, x=x, root=root) for x, root in zip(rows, roots, strict=True)]
    return _mean_gram(rows, columns, torch.float64, torch.float32)


def mean_drift(*originals_and_rows: torch.Tensor) -> torch.Tensor:
    """E[(x - x') x'^T] of batches of x and then of x', float [t, n], float32 [n, n].

    `Drift`'s, rounded.

    Raises:
        ValueError: no tokens.
    """
    originals, rows = _halves(originals_and_rows)
    width = rows[0].shape[1]
    room, whole = torch.empty(max(map(len, rows)), width), torch.empty(width, width)

    def product(
        block: slice, original: torch.Tensor, x: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        distance = room[: len(x), block]
        torch.sub(original[:, block].float(), x[:, block], out=distance)
        return fast(distance).T @ other

    products = [
        partial(product, original=original, x=x, other=fast(x))
        for original, x in zip(originals, rows, strict=True)
    ]
    for block, mean in _block_means(rows, products, torch.float64):
        whole[block] = mean
    return whole


def mean_output_moment(*rows: torch.Tensor) -> torch.Tensor:
    """G = E[g g^T] of batches [t, m], bfloat16 [m, m]: what `GroupMoments` finds, rounded.

    Raises:
        ValueError: no tokens.
    """
    return _mean_gram(rows, [partial(_columns, x=g) for g in rows], torch.float32, torch.bfloat16)


def moment_bytes(width: int, batch_tokens: int) -> int:
    """Memory that the mean moment of so many numbers takes beside the batches, about."""
    return 4 * width**2 + 8 * BLOCK * width * 3 + 4 * width * batch_tokens + _SMALL_BYTES


def _halves(
    tensors: Sequence[torch.Tensor],
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    half = len(tensors) // 2
    return tensors[:half], tensors[half:]


def _columns(start: int, x: torch.Tensor) -> torch.Tensor:
    return x[:, start:]


def _mean_gram(
    rows: Sequence[torch.Tensor],
    columns: Sequence[Callable[[int], torch.Tensor]],
    summed: torch.dtype,
    returned: torch.dtype,
) -> torch.Tensor:
    """Mean over tokens of the products of vectors with themselves, [n, n].

    Args:
        rows: batches [t, n].
        columns: give the vectors of each batch from a column on, [t, n - start].
        summed: what is summed in.
        returned: the mean is rounded to this.
    """

    def product(block: slice, take: Callable[[int], torch.Tensor]) -> torch.Tensor:
        batch = take(block.start)
        return batch[:, : block.stop - block.start].T @ batch

    width = rows[0].shape[1]
    whole = torch.empty(width, width, dtype=returned)
    products = [partial(product, take=take) for take in columns]
    for block, mean in _block_means(rows, products, summed):
        rounded = mean.to(returned)
        whole[block, block.start :] = rounded
        whole[block.stop :, block] = rounded[:, block.stop - block.start :].T
    return whole


def _block_means(
    rows: Sequence[torch.Tensor],
    products: Sequence[Callable[[slice], torch.Tensor]],
    summed: torch.dtype,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of a sum over all tokens, each divided by their number.

    Args:
        rows: batches [t, n].
        products: give what each batch adds to a block.
        summed: what is summed in.
    """
    width, tokens = rows[0].shape[1], sum(map(len, rows))
    if tokens == 0:
        raise ValueError(NO_TOKENS)
    for start in range(0, width, BLOCK):
        block = slice(start, min(start + BLOCK, width))
        with quick_float32():
            found = products[0](block)
            part = torch.zeros(found.shape, dtype=summed).add_(found)
            for product in products[1:]:
                part += product(block)
        yield block, part.div_(tokens)
