"""What `GroupMoments` sums, batch by batch where it is seen and sum by sum where it is added.

Each block of a sum is made of all batches, in their order, before the next is begun: the bytes are
those of the sums that grow batch by batch, and no float64 matrix is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from pipeline.calibrate.moments import BLOCK, cut_gradients, finite_rows
from pipeline.calibrate.precision import fast, quick_float32

# Of libraries, and of a heap that keeps what is freed.
_SMALL_BYTES = 1 << 27
_NO_TOKENS = "no tokens were accumulated"


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
    half = len(rows_and_weights) // 2
    rows = rows_and_weights[:half]
    roots = [weights.sqrt()[:, None] for weights in rows_and_weights[half:]]
    # As wide as the whole: what a product rounds may depend on where its rows lie.
    room = torch.empty(max(map(len, rows)), rows[0].shape[1])

    def weighted(start: int, x: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        return torch.mul(x[:, start:], root, out=room[: len(x), start:])

    columns = [partial(weighted, x=x, root=root) for x, root in zip(rows, roots, strict=True)]
    return _mean_gram(rows, columns, torch.float64, torch.float32)


def mean_drift(*originals_and_rows: torch.Tensor) -> torch.Tensor:
    """E[(x - x') x'^T] of batches of x and then of x', float [t, n], float32 [n, n].

    `Drift`'s, rounded.

    Raises:
        ValueError: no tokens.
    """
    half = len(originals_and_rows) // 2
    originals, rows = originals_and_rows[:half], originals_and_rows[half:]
    tokens, width = sum(map(len, rows)), rows[0].shape[1]
    if tokens == 0:
        raise ValueError(_NO_TOKENS)
    room, others = torch.empty(max(map(len, rows)), width), [fast(x) for x in rows]
    whole = torch.empty(width, width)
    with quick_float32():
        for start in range(0, width, BLOCK):
            end = min(start + BLOCK, width)
            part = torch.zeros(end - start, width, dtype=torch.float64)
            for original, x, other in zip(originals, rows, others, strict=True):
                distance = room[: len(x), start:end]
                torch.sub(original[:, start:end].float(), x[:, start:end], out=distance)
                part += fast(distance).T @ other
            whole[start:end] = part.div_(tokens)
    return whole


def mean_output_moment(*rows: torch.Tensor) -> torch.Tensor:
    """G = E[g g^T] of batches [t, m], bfloat16 [m, m]: what `GroupMoments` finds, rounded.

    Raises:
        ValueError: no tokens.
    """
    return _mean_gram(rows, [partial(_columns, x=g) for g in rows], torch.float32, torch.bfloat16)


def _columns(start: int, x: torch.Tensor) -> torch.Tensor:
    return x[:, start:]


def moment_bytes(width: int, batch_tokens: int) -> int:
    """Memory that the mean moment of so many numbers takes beside the batches, about."""
    return 4 * width**2 + 8 * BLOCK * width * 3 + 4 * width * batch_tokens + _SMALL_BYTES


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
    width, tokens = rows[0].shape[1], sum(len(batch) for batch in rows)
    if tokens == 0:
        raise ValueError(_NO_TOKENS)
    whole = torch.empty(width, width, dtype=returned)
    with quick_float32():
        for start in range(0, width, BLOCK):
            end = min(start + BLOCK, width)
            part = torch.zeros(end - start, width - start, dtype=summed)
            for take in columns:
                batch = take(start)
                part += batch[:, : end - start].T @ batch
            rounded = part.div_(tokens).to(returned)
            whole[start:end, start:] = rounded
            whole[end:, start:end] = rounded[:, end - start :].T
    return whole
