"""A transformers model of which some layers have no memory of their own.

The matrices of all layers are views of one piece of memory, in float32. Before a layer runs, its
own numbers are put there, from a buffer that stays or from one that was read meanwhile. All else
is transformers' code as it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_cache import cache_maps
from pipeline.checkpoint.skeleton import QuantizedMatrix, Skeleton, StoredMatrix
from pipeline.errors import InputError, UsageError
from pipeline.memory import return_free_memory
from pipeline.model.numbers import require_finite
from pipeline.model.structure import layer_list
from pipeline.model.weight_files import read_header, stored_places
from pipeline.progress import track
from pipeline.runtime.offload.layer_ring import RING_BUFFERS, LayerRing
from pipeline.runtime.offload.side_by_side import ModelCall, run_call, run_side_by_side
from pipeline.runtime.offload.steady_attention import STEADY_ATTENTION
from pipeline.runtime.offload.tables import HeadByParts, widen_rows
from pipeline.runtime.offload.weight_reader import Layout, WeightReader, aligned_buffer, lay_out


def _resident_layers(sizes: Sequence[int], budget_bytes: int) -> frozenset[int]:
    """The layers to keep: as many as fit, in full, spread over the model.

    While one of them is computed the next layers come from the disk, which would idle if they
    stood side by side, once all buffers were full.

    Args:
        sizes: bytes of each layer, as published.
        budget_bytes: that they may take together, 0 or more.

    Returns:
        Their numbers.
    """
    total = len(sizes)
    for count in range(total, 0, -1):
        chosen = frozenset((2 * place + 1) * total // (2 * count) for place in range(count))
        if sum(sizes[number] for number in chosen) <= budget_bytes:
            return chosen
    return frozenset()


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LANES = 16  # numbers to which a matrix's place is aligned
_FLOAT_BYTES = 4
_FREQUENCIES_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Traffic:
    """What a model has read from disk, and what it holds.

    Attributes:
        layers: of the model.
        resident: how many of them stay in memory.
        pass_bytes: read for a call, with what fills blocks up.
        read_bytes: read since the model was opened, by what the system handed over.
        passes: calls so far.
        waited_s: that calls have waited for the disk.
        direct: whether reads went past the page cache (O_DIRECT).
        held_bytes: of weights, buffers and cache: what is kept of the budget.
    """

    layers: int
    resident: int
    pass_bytes: int
    read_bytes: int
    passes: int
    waited_s: float
    direct: bool
    held_bytes: int


class StreamedModel:
    """A causal language model under a budget of bytes.

    Args:
        folder: a checkpoint whose matrices are plain numbers.
        memory_bytes: for weights, buffers and `other_bytes`.
        other_bytes: that are spent otherwise: cache and draft.

    Attributes:
        model: in float32, without gradients; called by `run`.

    Raises:
        InputError: the checkpoint is broken, or of a kind that cannot be offloaded.
        UsageError: the budget is too small; says what would do.
    """

    def __init__(self, folder: Path, memory_bytes: int, other_bytes: int = 0) -> None:
        self._folder = folder
        skeleton = Skeleton.load(folder, torch.float32)
        self.model = _prepared(skeleton, folder)
        self._path, layers = layer_list(self.model)
        self._layers, self._tables = _sorted_matrices(skeleton, self._path, len(layers))
        self._files = sorted({matrix.file for matrix in skeleton.matrices.values()})
        self._types = {file: read_header(file) for file in self._files}
        self._offsets = {file: stored_places(file) for file in self._files}
        self._layouts = [self._layout(own) for own in self._layers]
        self._plan(memory_bytes, other_bytes)
        self._reader = WeightReader(self._files)
        self._checked: set[int] = set()
        self._next: int | None = None
        self._by_layers = False  # whether each layer runs several calls before the next
        self._beside: tuple[Any, ...] | None = None
        self._steps: Iterator[int] = iter(())
        self._passes = 0
        self._share_memory()
        self._read_tables()
        return_free_memory()  # of what was made to look at the numbers
        for number in track(sorted(self._resident), "layers"):
            self._kept[number] = self._read_layer(number)
        self._reader.forget_pages()  # of vectors, which were read otherwise
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, number))
        layers[0].register_forward_hook(self._remember_form)
        self._streamed = [n for n in range(len(layers)) if n not in self._resident]
        self._ring: LayerRing | None = None
        if self._streamed:
            self._ring = LayerRing(self._reader, [self._layouts[n] for n in self._streamed])

    @property
    def traffic(self) -> Traffic:
        """What was read so far, and what is held."""
        return Traffic(
            len(self._layers),
            len(self._resident),
            sum(s.size for n in self._streamed for s in self._layouts[n].stretches),
            self._reader.read_bytes,
            self._passes,
            0.0 if self._ring is None else self._ring.waited_s,
            self._reader.direct,
            self._held_bytes,
        )

    def run(self, calls: Sequence[ModelCall], shown: str | None = None) -> list[torch.Tensor]:
        """Logits of each call, float32 [1, S, V], by one pass over the layers.

        What fails in it leaves the next pass as it would be.

        Args:
            calls: of which each has the bits that it has alone.
            shown: what they are for, to be said beside the layers that are done.

        Raises:
            InputError: the weights cannot be read, or hold what is no number.
        """
        self._next = 0
        if shown is not None:
            self._steps = iter(track(range(len(self._layers)), shown))
        try:
            found = self._run(calls, self._enter)
            self._finish_pass()
        except BaseException:
            if self._ring is not None:
                self._ring.restart()
            raise
        finally:
            self._next, self._steps = None, iter(())
        return found

    def _run(self, calls: Sequence[ModelCall], enter: Callable[[int], None]) -> list[torch.Tensor]:
        if len(calls) == 1:
            return [run_call(self.model, calls[0])]
        layers = list(self.model.get_submodule(self._path).children())
        self._by_layers = True
        try:
            return run_side_by_side(self.model, layers, calls, enter, self._beside)
        finally:
            self._by_layers = False

    @contextlib.contextmanager
    def first_layer_alone(self) -> Iterator[Callable[[Sequence[ModelCall]], list[torch.Tensor]]]:
        """`run` with no layer but the first, which is read once: to try things with."""
        parent, _, name = self._path.rpartition(".")
        owner = self.model.get_submodule(parent)
        layers: nn.ModuleList = getattr(owner, name)
        buffer = self._kept.get(0)
        self._put(0, self._read_layer(0) if buffer is None else buffer)
        setattr(owner, name, layers[:1])
        try:
            yield lambda calls: self._run(calls, lambda number: None)
        finally:
            setattr(owner, name, layers)

    def close(self) -> None:
        """End the thread that reads, and close the files."""
        if self._ring is not None:
            self._ring.close()
        self._reader.close()

    def _finish_pass(self) -> None:
        next(self._steps, None)
        if self._next != len(self._layers):
            raise self._unchained(self._next)
        self._passes += 1

    # --- memory ---

    def _plan(self, memory_bytes: int, other_bytes: int) -> None:
        """Decide which layers stay."""
        sizes = [layout.size for layout in self._layouts]
        fixed = other_bytes + _FLOAT_BYTES * self._shared_numbers()
        fixed += self._layout(self._tables).size
        fixed += sum(
            p.numel() * p.element_size()
            for p in self.model.state_dict().values()
            if 0 not in p.stride()
        )
        ring = RING_BUFFERS * max(sizes)
        self._kept: dict[int, np.ndarray] = {}
        if fixed + sum(sizes) <= memory_bytes:
            self._resident, ring = frozenset(range(len(sizes))), 0
        elif fixed + ring <= memory_bytes:
            self._resident = _resident_layers(sizes, memory_bytes - fixed - ring)
        else:
            raise UsageError(
                "The budget is too small for this model, whichever layers are read from disk.",
                where="--memory",
                observed=f"{memory_bytes / 1e6:.0f} MB",
                expected=f"at least {math.ceil((fixed + ring) / 1e6)} MB: "
                f"{ring / 1e6:.0f} for {RING_BUFFERS} layers on their way, {fixed / 1e6:.0f} for "
                "embedding, head, cache, draft and the layer at work",
            )
        self._held_bytes = fixed + ring + sum(sizes[number] for number in self._resident)

    def _shared_numbers(self) -> int:
        """Numbers of the memory that the layers share: those of the largest one."""
        return max(
            sum(-(-math.prod(matrix.shape) // _LANES) * _LANES for matrix in own.values())
            for own in self._layers
        )

    def _share_memory(self) -> None:
        """Let every layer's matrices be views of the same memory."""
        shared = torch.zeros(self._shared_numbers())
        self._views: list[dict[str, torch.Tensor]] = []
        for own in self._layers:
            place, views = 0, {}
            for name, matrix in own.items():
                count = math.prod(matrix.shape)
                views[name] = shared[place : place + count].view(matrix.shape)
                _set(self.model, name, views[name])
                place += -(-count // _LANES) * _LANES
            self._views.append(views)

    def _layout(self, matrices: Mapping[str, StoredMatrix]) -> Layout:
        return lay_out(
            {
                name: (self._files.index(m.file), *self._offsets[m.file][m.name])
                for name, m in matrices.items()
            }
        )

    def _read_tables(self) -> None:
        """Read embedding, head and what else belongs to no layer, and keep them as published."""
        layout = self._layout(self._tables)
        buffer = aligned_buffer(layout.size)
        self._reader.read(layout, buffer)
        stored = {n: self._stored(m, buffer, layout.places[n]) for n, m in self._tables.items()}
        for name, tensor in stored.items():
            require_finite(name, tensor, self._tables[name].file)
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        modules = dict(self.model.named_modules())
        for name, tensor in stored.items():
            module = modules[name.rpartition(".")[0]]
            if module is embedding:
                module.padding_idx = None  # of gradients, and the number of a row it is not given
                module.register_forward_pre_hook(partial(widen_rows, tensor))
            elif module is head:
                module.forward = HeadByParts(tensor, getattr(head, "bias", None))
            else:
                _set(self.model, name, tensor.float())

    def _stored(self, matrix: StoredMatrix, buffer: np.ndarray, place: int) -> torch.Tensor:
        """A matrix as published, where it lies in a buffer."""
        dtype = _DTYPES[self._types[matrix.file][matrix.name][0]]
        count = math.prod(matrix.shape)
        flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=place)
        return flat.view(matrix.shape)

    # --- layers ---

    def _read_layer(self, number: int) -> np.ndarray:
        buffer = aligned_buffer(self._layouts[number].size)
        self._reader.read(self._layouts[number], buffer)
        return buffer

    def _before(self, number: int, module: nn.Module, given: Any) -> None:
        """Put a layer's numbers where it looks for them; nothing where that was seen to."""
        if self._next is not None and not self._by_layers:
            self._enter(number)

    def _remember_form(self, module: nn.Module, given: Any, returned: Any) -> None:
        if not self._by_layers:
            self._beside = returned[1:] if isinstance(returned, tuple) else None

    def _enter(self, number: int) -> None:
        """Put the next layer's numbers where it looks for them."""
        if number != self._next:
            raise self._unchained(number)
        self._next = number + 1
        next(self._steps, None)
        kept = self._kept.get(number)
        if kept is not None:
            self._put(number, kept)
            return
        assert self._ring is not None
        try:
            self._put(number, self._ring.take())
        finally:
            self._ring.release()

    def _put(self, number: int, buffer: np.ndarray) -> None:
        places = self._layouts[number].places
        for name, matrix in self._layers[number].items():
            view = self._views[number][name]
            view.copy_(self._stored(matrix, buffer, places[name]))
            if number not in self._checked:
                require_finite(name, view, matrix.file)
        self._checked.add(number)

    def _unchained(self, number: int | None) -> InputError:
        return InputError(
            "This model does not run its layers once each, one after the other.",
            where=self._folder,
            observed=f"layer {number} out of turn",
        )


def _prepared(skeleton: Skeleton, folder: Path) -> PreTrainedModel:
    """The model with steady attention; raise InputError for what cannot be offloaded."""
    model = skeleton.model
    few = [name for name, m in skeleton.matrices.items() if isinstance(m, QuantizedMatrix)]
    odd = "attention of the class's own" if not model._can_set_attn_implementation() else ""
    odd = "a cache of latents" if cache_maps(model) else odd
    odd = f"{few[0]} in few bits" if few else odd
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in _FREQUENCIES_BY_LENGTH:
        odd = f"rotary frequencies that change with the length ({rope['rope_type']})"
    if odd:
        raise InputError(
            "A model of this kind cannot be offloaded.",
            where=folder,
            observed=odd,
            expected="a decoder with matrices of plain numbers",
            change="leave --memory out, or give the model that it was made from",
        )
    model.set_attn_implementation(STEADY_ATTENTION)
    return model


def _sorted_matrices(
    skeleton: Skeleton, path: str, count: int
) -> tuple[list[dict[str, StoredMatrix]], dict[str, StoredMatrix]]:
    """The matrices of each layer, and those of none."""
    layers: list[dict[str, StoredMatrix]] = [{} for _ in range(count)]
    rest: dict[str, StoredMatrix] = {}
    for name, matrix in sorted(skeleton.matrices.items()):
        inside = name.removeprefix(f"{path}.")
        if inside != name:
            layers[int(inside.partition(".")[0])][name] = matrix
        else:
            rest[name] = matrix
    return layers, rest


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = nn.Parameter(tensor, requires_grad=False)
