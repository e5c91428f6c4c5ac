"""A second model drafts: small, of the same tokens, and over the same cache (SubSpec, 2025).

It writes the keys and values of its guesses where the model's own will stand, behind what the model
has read. So it reads no prompt and holds no cache, and sees the exact keys and values of everything
before its guesses. The call that checks them writes over every one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import InputError, UsageError
from pipeline.export.contract import CPU, FLOAT, WEIGHTS_FILE
from pipeline.export.record import ExportRecord, read_export_record
from pipeline.json_file import read_json_object
from pipeline.model.task import require_decoder
from pipeline.progress import note
from pipeline.runtime.draft_costs import MOST_DRAFTED, STEADY_ROWS, DraftCosts, GuessOdds
from pipeline.runtime.draft_tree import Draft, TreeGrowth, is_leaf, path_of
from pipeline.runtime.drafting import Chooser, Drafter, FirstOf, PromptLookup
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.open_session import folder_kind
from pipeline.runtime.sessions.session import BlockSession, Session
from pipeline.runtime.sessions.slotted_session import SlottedSession
from pipeline.tokenizer_files import vocabulary_hashes

# Share of right guesses at which drafting has to pay, to be tried at all: few drafts have more.
_GOOD_ACCEPTANCE = 0.9
# Guesses at a place of a tree; of those behind the third hardly any is right.
_USUAL_WIDTH = 3
# What a model and its draft have to have in common, as an export's record names it.
SHARED = ("vocab_size", "num_layers", "max_length", "cache_format")
_ROTATION = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")


class DraftSession(Protocol):
    """A session over the cache of another."""

    call_times: CallTimes

    def take_up(self, slot: int, length: int) -> None:
        """Go on behind the first `length` tokens of a slot, whichever session has read them."""

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """Append [S] tokens to a slot: the last one's logits, float32 [V]."""

    def sibling(self) -> Session:
        """The same model over a cache of its own."""


class DraftModel:
    """A model that drafts for another, one answer or slot at a time.

    Args:
        target: checks the drafts; steady, so that no answer depends on what was drafted.
        session: the draft's, over the cache of `target`.
        lookup: ask prompt lookup first, which costs nothing.
        length: tokens of every draft, 0 for none; None takes as many as pay by what is measured.
        width: most guesses at one place of an answer; 1 drafts chains, and None trees where
            `target` checks them.

    Raises:
        UsageError: `target` checks chains alone, and `width` is more than 1.
    """

    def __init__(
        self,
        target: SlottedSession,
        session: DraftSession,
        lookup: bool,
        length: int | None = None,
        width: int | None = None,
    ) -> None:
        self._session, self._lookup = session, lookup
        self._length = None if length is None else min(length, MOST_DRAFTED)
        self._width = _width_for(target, width)
        self._row_cost = target.row_cost or 1.0
        self._costs = DraftCosts(target.call_times, session.call_times, self._row_cost)
        self._odds = GuessOdds()
        self._has_told = False

    def begin(self, slot: int) -> Drafter:
        own = _ModelDrafter(self, slot)
        if not self._lookup:
            return own
        # Where the model rests, the row that is computed beside a token in any case is looked up.
        return FirstOf(PromptLookup(self._row_cost), own, PromptLookup(self._row_cost, STEADY_ROWS))

    def take_notice(self) -> str | None:
        if self._has_told or self._costs.reason is None:
            return None
        self._has_told = True
        return self._costs.reason

    def session_alone(self) -> Session:
        """The draft as a model of its own, over the same weights and a cache that is not shared."""
        return self._session.sibling()

    def learn(self, growth: TreeGrowth, drafted: Draft, chosen: Sequence[int]) -> None:
        """Hear what came where a tree was grown, and drafted in part."""
        path = path_of(drafted, chosen)
        is_wrong = not is_leaf(drafted, path[-1] if path else -1)
        self._costs.learn(len(path), len(path) + is_wrong)
        node: int | None = -1
        for token in chosen if self._width > 1 else ():
            guesses = [n for n, parent in enumerate(growth.parents) if parent == node]
            for n in guesses:
                self._odds.learn(*growth.sources[n], growth.tokens[n] == token)
            node = next((n for n in guesses if growth.tokens[n] == token), None)

    def grow(
        self, slot: int, read: int, token: int, most: int, begin: Callable[[], Chooser]
    ) -> TreeGrowth:
        """What may come behind a token, as this model has it.

        Args:
            slot: of the answer.
            read: tokens that the cache holds, all of them read by the target.
            token: the next one.
            most: limit of the guesses one behind another.
            begin: gives what chooses them.
        """
        growth, end = self._planned(most), -1
        choosers: dict[int, Chooser] = {}
        while (node := growth.next_step()) is not None:
            kept, unread = growth.unread(node)
            start = read if node < 0 else read + 1 + kept
            ids = [token] if node < 0 else [growth.tokens[n] for n in unread]
            if start != end:
                self._session.take_up(slot, start)
            end = start + len(ids)
            logits = self._session.prefill(slot, np.array(ids, np.int64))
            before = None if node < 0 else choosers[growth.parents[node]]
            choosers[node] = begin() if before is None else before.behind(growth.tokens[node])
            growth.add(node, *self._guesses(choosers[node], logits))
        return growth

    def _guesses(
        self, chooser: Chooser, logits: np.ndarray
    ) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Tokens with their odds, and what these go by; as `TreeGrowth.add` takes them."""
        found = chooser.rank(logits, self._width)
        sources = [(rank, weight) for rank, (_, weight) in enumerate(found)]
        odds = [1.0 if self._width == 1 else self._odds.of(*source) for source in sources]
        return [(token, p) for (token, _), p in zip(found, odds, strict=True)], sources

    def _planned(self, most: int) -> TreeGrowth:
        """A tree without tokens, of the size that pays."""
        first = self._odds.first if self._width > 1 else 1.0
        if self._length is not None:
            return TreeGrowth(self._length, most, first)
        rows, shares = self._costs.length(most), self._costs.shares()
        if self._width == 1 or rows == 0 or shares is None:
            return TreeGrowth(rows, most, first)
        return TreeGrowth(MOST_DRAFTED, most, first, *shares)


def _width_for(target: SlottedSession, width: int | None) -> int:
    """Most guesses at one place; raise UsageError for several that cannot be checked."""
    if isinstance(target, BlockSession):
        return _USUAL_WIDTH if width is None else width
    if width is not None and width > 1:
        raise UsageError(
            "This model checks one chain of draft tokens at a time.",
            where=target.name,
            observed=f"a width of {width}",
            change="leave --draft-width out; a checkpoint with --memory or --vram checks trees",
        )
    return 1


class _ModelDrafter:
    """The drafts of one answer: a `GuessingDrafter`."""

    def __init__(self, model: DraftModel, slot: int) -> None:
        self.drafted = self.taken = 0
        self._model, self._slot = model, slot
        self._begin: Callable[[], Chooser] = Chooser
        self._heard = 0  # tokens of prompt and answer
        self._last = -1
        self._grown: tuple[TreeGrowth, Draft] | None = None

    def guess_by(self, begin: Callable[[], Chooser]) -> None:
        self._begin = begin

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        if self._grown is not None and drafted:
            self._model.learn(*self._grown, chosen)
            self.taken += len(path_of(drafted, chosen))
        self._grown = None
        self._heard += len(chosen)
        self._last = chosen[-1] if chosen else self._last

    def draft(self, most: int) -> Sequence[int]:
        # The model is to read the last token beside the drafts.
        at = self._slot, self._heard - 1, self._last
        growth = self._model.grow(*at, most, self._begin)
        found = growth.draft()
        self._grown = growth, found
        self.drafted += len(found)
        return found


def open_drafted(
    folder: Path,
    draft: Path,
    backend: str = "auto",
    threads: int | None = None,
    slots: int = 1,
    lookup: bool = False,
    length: int | None = None,
    width: int | None = None,
) -> tuple[CpuSession, DraftModel | None]:
    """Open a model, and beside it a smaller one that drafts for it over the same cache.

    Args:
        folder: an export of the profile `cpu`.
        draft: another of the same model, in fewer bytes.
        backend: `auto` or `onnx`.
        threads: of ONNX Runtime, for each; None takes one to a physical core.
        slots: rows of the cache.
        lookup: ask prompt lookup before the draft.
        length: tokens of every draft, 0 for none; None takes as many as pay.
        width: most guesses at one place: 1, or None.

    Returns:
        The session, and what drafts for it: None, which is said, where the bytes of the two leave
        nothing to gain; the session is then the same as without a draft.

    Raises:
        InputError: a folder does not load, or the two do not fit each other.
        UsageError: a folder or `backend` is of another kind.
    """
    model = require_target(folder, backend)
    own = {name: getattr(model, name) for name in SHARED}
    require_pair(folder, draft, own, rotation_of(folder), backend)
    if length is None and not can_pay(folder, (draft / WEIGHTS_FILE).stat().st_size):
        return CpuSession(folder, threads, slots=slots), None
    target = CpuSession(folder, threads, slots=slots, steady=True)
    session = CpuSession(draft, threads, values=target.values)
    return target, DraftModel(target, session, lookup, length, width)


def require_target(folder: Path, backend: str = "auto") -> ExportRecord:
    """The record of an export for which a model can draft.

    Raises:
        InputError: its files do not belong together, or its cache cannot be shared.
        UsageError: it is no export of the profile `cpu`, or `backend` is another one.
    """
    model = _require_export(folder, backend)
    if model.cache_format != FLOAT:
        raise InputError(
            "A cache in few bits cannot be shared: each export has scales of its own.",
            where=folder,
            observed=f"cache {model.cache_format}",
            expected=f"cache {FLOAT}",
            change="export both without --cache",
        )
    return model


def _require_export(folder: Path, backend: str) -> ExportRecord:
    """The record of an export of the profile `cpu`; raise for anything else."""
    kind = folder_kind(folder)
    require_decoder(folder)
    observed = f"a folder for the backend '{kind}'"
    if kind == "onnx" and backend in ("auto", kind):
        record = read_export_record(folder)
        if record.traits.contrib:
            return record
        observed = f"an export of the profile '{record.profile}'"
    raise UsageError(
        f"Drafting with a model needs two exports of the profile '{CPU}', and --backend onnx.",
        where=folder,
        observed=f"{observed}, --backend {backend}",
        change=f"skipcat export CHECKPOINT -o FOLDER --profile {CPU}",
    )


def require_pair(
    folder: Path,
    draft: Path,
    model: Mapping[str, object],
    rotation: Mapping[str, object],
    backend: str = "auto",
) -> ExportRecord:
    """Hold a draft against the model that it is to draft for, before either is loaded.

    Args:
        folder: of the model.
        draft: an export of the profile `cpu`.
        model: `SHARED` of the model, by name.
        rotation: of the model, as `rotation_of` tells it.
        backend: `auto` or `onnx`.

    Returns:
        The draft's record.

    Raises:
        InputError: the two do not fit each other.
        UsageError: the draft is no such export, or the model itself.
    """
    small = _require_export(draft, backend)
    found = {name: getattr(small, name) for name in model}
    require_same(folder, draft, (model, rotation), (found, rotation_of(draft)))
    return small


_Facts = tuple[Mapping[str, object], Mapping[str, object]]


def require_same(folder: Path, draft: Path, model: _Facts, small: _Facts) -> None:
    """Hold what is told of a draft against what is told of the model.

    Args:
        folder: of the model.
        draft: of the draft.
        model: what both have to have in common, by name, and the rotation, as `rotation_of` tells
            it.
        small: the same, of the draft.

    Raises:
        InputError: they differ, or the tokenizers do.
        UsageError: the draft is the model itself.
    """
    if folder.resolve() == draft.resolve():
        raise UsageError(
            "A model cannot draft for itself: it would save no call.",
            observed=draft,
            change="give --draft an export of the same model in fewer bytes",
        )
    for name, wanted in model[0].items():
        found = small[0][name]
        if wanted != found:
            raise InputError(
                "This draft does not fit the model.",
                where=draft,
                observed=f"{name} {found}",
                expected=f"{name} {wanted}, as {folder} has",
                change="make both from the same model, with the same --max-length",
            )
    if model[1] != small[1]:
        raise InputError(
            "This draft does not fit the model: it turns its keys by other angles.",
            where=draft / "config.json",
            observed=small[1],
            expected=model[1],
            change="make the draft from the same model",
        )
    if vocabulary_hashes(folder) != vocabulary_hashes(draft):
        raise InputError(
            "This draft does not fit the model: its tokenizer is another one.",
            where=draft,
            expected=f"the tokenizer files of {folder}",
            change="make the draft from the same model",
        )


def rotation_of(folder: Path) -> dict[str, Any]:
    """What config.json says of the angles by which positions turn the keys of the cache."""
    path = folder / "config.json"
    return rotation_in(read_json_object(path) if path.is_file() else {})


def rotation_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of what a config says."""
    return {name: fields[name] for name in _ROTATION if name in fields}


def can_pay(folder: Path, draft_bytes: int) -> bool:
    """Whether drafts could save time by the bytes that a step of each reads; says if they cannot.

    It does not go by a clock, so that an answer's bits do not either.

    Args:
        folder: the export whose calls are to be saved.
        draft_bytes: weights of the draft.
    """
    whole = (folder / WEIGHTS_FILE).stat().st_size
    if CpuSession.row_cost is None or CpuSession.row_cost + draft_bytes / whole < _GOOD_ACCEPTANCE:
        return True
    note(
        f"no drafts: the draft has {draft_bytes / 1e6:.1f} MB to the model's {whole / 1e6:.1f}, "
        "and cannot pay for itself; without --draft, --lookup may"
    )
    return False
