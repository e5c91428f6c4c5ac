"""A checkpoint larger than memory behind the Session interface: layers come for every call.

They come from disk, or from the host's memory to a GPU. A pass over them costs the same whatever is
read in it, so answers in several slots share one, and every call in it computes the same number of
rows over a cache of the same length: a token's bits are then its own, and neither drafts nor other
answers change any.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import InputError, UsageError
from pipeline.export.contract import cache_names
from pipeline.memory import return_free_memory
from pipeline.runtime.draft_tree import depths_of
from pipeline.runtime.offload.device_ring import StreamDevice
from pipeline.runtime.offload.device_weights import DeviceWeights
from pipeline.runtime.offload.held_cache import DeviceCache, HostCache
from pipeline.runtime.offload.host_weights import HostWeights
from pipeline.runtime.offload.side_by_side import ModelCall
from pipeline.runtime.offload.steady_attention import CallCache, Part
from pipeline.runtime.offload.stored_model import StoredModel
from pipeline.runtime.offload.streamed_model import LayerWeights, StreamedModel
from pipeline.runtime.offload.traffic import Traffic
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.key_values import KeyValues
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS
from pipeline.runtime.sessions.session import Block
from pipeline.runtime.sessions.slotted_session import SlottedSession

# Rows of a call: of an answer with its drafts, of a short prompt, and of parts of a longer one.
_ROWS = (STEADY_TOKENS, 64, 256)
# Where tokens are cut to try whether their bits stay, how many others are read beside them, and
# whether these are a branch that is not the first.
_TRIED = (
    ((), 0, False), ((1, 2, 3, 4), 0, False), ((6,), 0, False), ((16,), 0, False),
    ((1, 2, 3, 4), 2, False), ((16,), 2, False), ((6,), 0, True), ((6,), 2, True),
)  # fmt: skip
# Tokens that a call counts as: those of one without drafts, in any steady session; and one more
# for every branch of draft tokens but the first.
_COUNTED = 2
# Of what another token adds to a call: choosing it. Its row is computed in any case.
_ROW_COST = 0.01
_FLOAT_BYTES = 4


class StreamedSession(SlottedSession):
    """PyTorch over a checkpoint of which a part stays in memory, and the rest is read each time.

    Args:
        folder: a checkpoint with plain matrices.
        memory_bytes: that weights, buffers, cache and `other_bytes` may take together.
        length: places of the cache.
        slots: rows of the cache to begin with.
        other_bytes: what else the budget is for, such as a draft.
        device: that computes, in the published type, under a budget of its own memory; None for
            the CPU, in float32.
        is_shared: on a device, whether `values` has a copy of the cache, for a draft to read.
        stored: what was read of the folder, if it was.
        steady: compute as many rows in every call of an answer, so that drafts change no bit; else
            a token alone is computed alone, which is quicker where the disk is.

    Attributes:
        values: the cache, float32, as an export of the profile `cpu` has it; or room for a copy.
        cache: as calls see it.
        call_times: of calls.

    Raises:
        InputError: the checkpoint is broken, or cannot be offloaded; or its bits depend, here, on
            how many tokens are read at once.
        UsageError: the budget is too small.
    """

    row_cost: float | None = _ROW_COST

    def __init__(
        self,
        folder: Path,
        memory_bytes: int,
        length: int,
        slots: int = 1,
        other_bytes: int = 0,
        steady: bool = True,
        device: StreamDevice | None = None,
        is_shared: bool = False,
        stored: StoredModel | None = None,
    ) -> None:
        widths = _cache_widths(folder)
        numbers = slots * length * sum(heads * width for heads, width in widths.values())
        stored = stored or StoredModel(folder)
        self.values = KeyValues(slots, widths, length, np.dtype(np.float32))
        self.cache: HostCache | DeviceCache
        weights: LayerWeights
        if device is None:
            weights = HostWeights(stored, memory_bytes, other_bytes + _FLOAT_BYTES * numbers)
            self.cache, kind = HostCache(self.values), "float32"
        else:
            weights = DeviceWeights.of(
                stored, device, memory_bytes, other_bytes, numbers, _ROWS[-1], length
            )
            like = torch.zeros(0, dtype=stored.dtype, device=device.place)
            self.cache = DeviceCache(self.values, like, is_shared)
            kind = f"{device.place.type} {str(stored.dtype).removeprefix('torch.')}"
        self._streamed = StreamedModel(stored.model, weights)
        self._end = weakref.finalize(self, self._streamed.close)
        self._folder, self.max_length = folder, length
        self.vocab_size = self._streamed.model.config.get_text_config().vocab_size
        self.call_times = CallTimes()
        self._lengths = np.zeros(slots, np.int64)
        # What was read last into each slot, in which call, and from which row of it on.
        self._last: dict[int, tuple[Part, CallCache | None, int]] = {}
        self._rows = None
        self._sizes = _ROWS if steady else (1, *_ROWS)
        self._steady = steady
        found = self.traffic
        moved = f"{found.layers - found.resident} of {found.layers} layers"
        self.name = f"torch {kind}, {moved} {'read' if device is None else 'copied'}"
        if steady:
            self._require_steadiness()
        return_free_memory()

    @property
    def traffic(self) -> Traffic:
        """What was read from disk or copied to a GPU, and what is held."""
        return self._streamed.traffic

    def close(self) -> None:
        """End the thread that reads; the session is of no use afterwards."""
        self._end()

    def sibling(self) -> StreamedSession:
        raise UsageError(
            "An offloaded model is opened once: its layers share one piece of memory.",
            change="use slots of the one session",
        )

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        rows, _ = self._check_call(input_ids)
        if rows > self.slots:
            self._grow(rows)
        self._rows = rows
        return np.stack(self._read_blocks([Block(n, input_ids[n], last_only) for n in range(rows)]))

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of several slots, in one pass: float32 [slots, V]."""
        ids = np.array(tokens, np.int64)[:, None]
        blocks = [Block(slot, row, True) for slot, row in zip(slots, ids, strict=True)]
        return np.concatenate(self.read_blocks(blocks))

    def read_blocks(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        """As of a `BlockSession`: every layer is read once, whatever the blocks hold."""
        for block in blocks:
            self._check_tokens(block.ids[None])
            deepest = len(block.ids) if block.parents is None else 1 + max(depths_of(block.parents))
            self._check_room(int(self._lengths[block.slot]), deepest)
        return self._read_blocks(blocks)

    def keep_path(self, slot: int, path: Sequence[int]) -> None:
        """As of a `BlockSession`: rows of another branch than the first are moved down."""
        part, cache, first = self._last[slot]
        kept = part.branches[0][1 : 1 + len(path)]
        self._lengths[slot] = part.start + 1 + len(path)
        if list(path) != kept.tolist():
            assert cache is not None
            cache.write_path(first, part, path)
            self.cache.tell([Part(slot, part.start + 1, part.ids[list(path)])])

    def _read(self, row: int, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        return self._read_blocks([Block(row, input_ids, last_only)])[0][None]

    def _read_blocks(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        """Logits of each block, [S, V] or [1, V], by one pass over the layers."""
        if not self._steady and len(blocks) > 1:
            return [found for block in blocks for found in self._read_blocks([block])]
        longest = max(len(block.ids) for block in blocks)
        shown = "reading the prompt" if longest > STEADY_TOKENS else None
        planned = self._plan(blocks)
        began = time.perf_counter()
        calls = [self._call_of(pieces) for pieces in planned]
        outputs = self._streamed.run(calls, shown)
        if longest <= STEADY_TOKENS:  # else there is more to compute than in a call of an answer
            self._count_time(planned, (time.perf_counter() - began) / len(blocks))
        else:
            return_free_memory()
        found = self._sorted_logits(planned, outputs)
        self.cache.tell([piece.part for pieces in planned for piece in pieces])
        self._remember(planned, calls)
        return [found[block.slot] for block in blocks]

    def _count_time(self, planned: Sequence[Sequence[_Piece]], seconds: float) -> None:
        """Remember an answer's time of a call by its branches: each is attended to apart."""
        branches = [len(piece.part.branches) for pieces in planned for piece in pieces]
        self.call_times.add(_COUNTED + sum(branches) // len(branches) - 1, seconds)

    def _remember(self, planned: Sequence[Sequence[_Piece]], calls: Sequence[ModelCall]) -> None:
        """Count what was read, and keep calls whose tokens branch until a path is chosen."""
        for pieces, call in zip(planned, calls, strict=True):
            first = 0
            for piece in pieces:
                part = piece.part
                self._lengths[part.slot] = part.start + len(part.branches[0])
                has_branches = part.parents is not None
                self._last[part.slot] = part, call.cache if has_branches else None, first
                first += len(part.ids)

    def _plan(self, blocks: Sequence[Block]) -> list[list[_Piece]]:
        """What each call reads: long pieces by themselves, in their order, short ones together."""
        most, least = self._sizes[-1], self._sizes[0]
        alone: list[list[_Piece]] = []
        together: list[list[_Piece]] = []
        for block in blocks:
            start = int(self._lengths[block.slot])
            for first in range(0, len(block.ids), most):
                ids = block.ids[first : first + most]
                is_wanted = not block.last_only or first + most >= len(block.ids)
                part = Part(block.slot, start + first, ids, block.parents)
                piece = _Piece(part, is_wanted, block.last_only)
                fitting = [c for c in together if sum(map(len, c)) + len(ids) <= least]
                if len(ids) > least:
                    alone.append([piece])
                elif fitting:
                    fitting[0].append(piece)
                else:
                    together.append([piece])
        return [*alone, *together]  # the end of a block comes behind its beginning

    def _call_of(self, pieces: Sequence[_Piece]) -> ModelCall:
        count = sum(map(len, pieces))
        rows = next(rows for rows in self._sizes if rows >= count)
        # What fills the call up repeats the last token, and nothing of it is kept.
        cache = CallCache(self.cache.tensors(), [piece.part for piece in pieces], rows)
        # The head is multiplied with as many rows whether one is wanted of a prompt or all are.
        few = pieces[0].last_only and rows > self._sizes[0]
        last = torch.full((self._sizes[0],), count - 1, device=cache.device)
        return ModelCall(cache, last if few else 0)

    def _sorted_logits(
        self, planned: Sequence[Sequence[_Piece]], outputs: Sequence[torch.Tensor]
    ) -> dict[int, np.ndarray]:
        """Logits of each slot's block, out of those of calls; InputError for what are none."""
        found: dict[int, list[np.ndarray]] = {}
        for pieces, output in zip(planned, outputs, strict=True):
            row, logits = 0, output.float().cpu()
            for piece in pieces:
                count = len(piece)
                row += count
                if not piece.is_wanted:
                    continue
                few = piece.last_only and logits.shape[1] < row
                own = logits[0, :1] if few else logits[0, row - count : row]
                self._require_numbers(piece.part, own)
                own = own[-1:] if piece.last_only else own
                found.setdefault(piece.part.slot, []).append(own.numpy().copy())
        return {slot: np.concatenate(parts) for slot, parts in found.items()}

    def _require_numbers(self, part: Part, logits: torch.Tensor) -> None:
        if not bool(torch.isfinite(logits.sum(dtype=torch.float64))):
            raise InputError(
                "The model's logits are no numbers.",
                where=self._folder,
                observed=f"NaN or infinity behind {part.start} tokens",
                change="compare with the model that was published, or leave --memory or --vram out",
            )

    def _require_steadiness(self) -> None:
        """Read the same tokens in several ways; raise InputError unless all bits are the same.

        By the first layer alone, with embedding and head: the others are multiplied like it. The
        ways are alone, cut up, and beside others, in one call and in several.
        """
        count = min(_ROWS[0], self.max_length)
        ids = np.arange(count) * 7919 % self.vocab_size
        own, self.cache = self.cache, self.cache.trial(3)
        lengths, self._lengths = self._lengths, np.zeros(3, np.int64)
        found = set()
        with self._streamed.first_layer_alone() as run:
            for cuts, others, forks in _TRIED:
                parts = np.split(ids, [min(cut, count - 1) for cut in cuts])
                found.add(self._tried(run, [part for part in parts if len(part)], others, forks))
        self.cache, self._lengths = own, lengths
        if len(found) > 1:
            raise InputError(
                "Here the bits of a token depend on what is read with it, so a draft would change "
                "answers.",
                where=self._folder,
                observed="other bits where it stands elsewhere in a call",
                change="run the model without --memory or --vram",
            )

    def _tried(
        self,
        run: Callable[[Sequence[ModelCall]], list[torch.Tensor]],
        parts: Sequence[np.ndarray],
        others: int,
        forks: bool,
    ) -> str:
        """What comes of tokens that are read part by part beside other slots, as a hash.

        Where it forks, another token stands behind the first of a part, before the part's own.
        """
        self._lengths[:] = 0
        seen = hashlib.sha256()
        for part in parts:
            blocks = [Block(slot, part[::-1].copy(), False) for slot in range(1, 1 + others)]
            is_fork = forks and len(part) > 1
            own = Block(0, part)
            if is_fork:
                ids = np.concatenate([part[:1], part[-1:], part[1:]])
                own = Block(0, ids, parents=(-1, 0, 0, *range(2, len(part))))
            planned = self._plan([*blocks, own])
            calls = [self._call_of(pieces) for pieces in planned]
            logits = self._sorted_logits(planned, run(calls))[0]
            self._remember(planned, calls)
            if is_fork:
                self.keep_path(0, range(2, len(ids)))
                logits = np.delete(logits, 1, axis=0)
            seen.update(logits.tobytes())
        count = int(self._lengths[0])
        for held in self.cache.tensors()[0]:
            seen.update(held[0, :, :count].float().cpu().numpy().tobytes())
        return seen.hexdigest()


@dataclass(frozen=True)
class _Piece:
    """A block, or as much of a long one as a call reads.

    Attributes:
        part: its tokens and their place.
        is_wanted: whether any of its logits are.
        last_only: whether it is those of its last token.
    """

    part: Part
    is_wanted: bool
    last_only: bool

    def __len__(self) -> int:
        return len(self.part.ids)


def _cache_widths(folder: Path) -> dict[str, tuple[int, int]]:
    """(heads, width) of keys and values of every layer, by the names that an export has."""
    from pipeline.checkpoint.folder import read_architecture

    config = read_architecture(folder)[0].get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dict.fromkeys(cache_names(config.num_hidden_layers), (heads, width))
