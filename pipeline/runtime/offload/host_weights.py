"""Layers that are read from disk for a call, while the one before is computed in float32.

The matrices of all layers are views of one piece of memory, in float32. Before a layer runs, its
own numbers are put there, from a buffer that stays or from one that was read meanwhile.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pipeline.memory import return_free_memory
from pipeline.model.numbers import require_finite
from pipeline.progress import track
from pipeline.runtime.offload.layer_ring import LayerRing
from pipeline.runtime.offload.residency import Budget
from pipeline.runtime.offload.stored_model import StoredModel, set_matrix
from pipeline.runtime.offload.tables import HeadByParts, look_up_in
from pipeline.runtime.offload.traffic import Traffic

_LANES = 16  # numbers to which a matrix's place is aligned
_FLOAT_BYTES = 4


class HostWeights:
    """The numbers of a model's layers: some stay in memory, the others come from disk.

    Args:
        stored: the model, whose matrices are set, and its files.
        memory_bytes: for weights, buffers and `other_bytes`.
        other_bytes: that are spent otherwise: cache and draft.

    Raises:
        InputError: the weights cannot be read, or hold what is no number.
        UsageError: the budget is too small; says what would do.
    """

    def __init__(self, stored: StoredModel, memory_bytes: int, other_bytes: int = 0) -> None:
        self._stored = stored
        sizes = [layout.size for layout in stored.layouts]
        fixed = other_bytes + _FLOAT_BYTES * self._shared_numbers()
        fixed += stored.table_bytes + stored.vector_bytes
        held = "embedding, head, cache, draft and the layer at work"
        self._plan = Budget(memory_bytes, "--memory", held).plan(sizes, fixed)
        self._checked: set[int] = set()
        self._share_memory()
        self._set_tables()
        return_free_memory()  # of what was made to look at the numbers
        self._kept: dict[int, np.ndarray] = {}
        for number in track(sorted(self._plan.resident), "layers"):
            self._kept[number] = stored.read_layer(number)
        stored.reader.forget_pages()  # of vectors, which were read otherwise
        self._streamed = [n for n in range(len(sizes)) if n not in self._kept]
        self._ring: LayerRing | None = None
        if self._streamed:
            self._ring = LayerRing(stored.reader, [stored.layouts[n] for n in self._streamed])

    def traffic(self, passes: int) -> Traffic:
        """What was read so far in so many calls, and what is held."""
        layouts = self._stored.layouts
        return Traffic(
            len(layouts),
            len(self._kept),
            sum(s.size for n in self._streamed for s in layouts[n].stretches),
            self._stored.reader.read_bytes,
            passes,
            0.0 if self._ring is None else self._ring.waited_s,
            self._stored.reader.direct,
            self._plan.held_bytes,
        )

    def enter(self, number: int) -> None:
        """Put a layer's numbers where it looks for them."""
        kept = self._kept.get(number)
        if kept is not None:
            self._put(number, kept)
            return
        assert self._ring is not None
        try:
            self._put(number, self._ring.take())
        finally:
            self._ring.release()

    def end_pass(self) -> None:
        """Nothing: every layer's buffer was given back when the layer was put."""

    def restart(self) -> None:
        """Let the next layer be the first again, whatever went wrong."""
        if self._ring is not None:
            self._ring.restart()

    def close(self) -> None:
        """End the thread that reads, and close the files."""
        if self._ring is not None:
            self._ring.close()
        self._stored.reader.close()

    def _shared_numbers(self) -> int:
        """Numbers of the memory that the layers share: those of the largest one."""
        return max(
            sum(-(-math.prod(matrix.shape) // _LANES) * _LANES for matrix in own.values())
            for own in self._stored.layers
        )

    def _share_memory(self) -> None:
        """Let every layer's matrices be views of the same memory."""
        shared = torch.zeros(self._shared_numbers())
        self._views: list[dict[str, torch.Tensor]] = []
        for own in self._stored.layers:
            place, views = 0, {}
            for name, matrix in own.items():
                count = math.prod(matrix.shape)
                views[name] = shared[place : place + count].view(matrix.shape)
                set_matrix(self._stored.model, name, views[name])
                place += -(-count // _LANES) * _LANES
            self._views.append(views)

    def _set_tables(self) -> None:
        """Keep embedding, head and what else belongs to no layer as published."""
        model = self._stored.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        modules = dict(model.named_modules())
        for name, tensor in self._stored.read_tables().items():
            module = modules[name.rpartition(".")[0]]
            if module is embedding:
                look_up_in(module, tensor, torch.zeros(0))
            elif module is head:
                module.forward = HeadByParts(tensor, getattr(head, "bias", None))
            else:
                set_matrix(model, name, tensor.float())

    def _put(self, number: int, buffer: np.ndarray) -> None:
        stored = self._stored
        for name, tensor in stored.tensors(number, buffer).items():
            view = self._views[number][name]
            view.copy_(tensor)
            if number not in self._checked:
                require_finite(name, view, stored.layers[number][name].file)
        self._checked.add(number)
