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
from pipeline.runtime.draft_costs import MOST_DRAFTED, STEADY_ROWS, DraftCosts
from pipeline.runtime.drafting import Chooser, Drafter, FirstOf, PromptLookup
from pipeline.runtime.prefix_cache import common_length
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.open_session import folder_kind
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.sessions.slotted_session import SlottedSession
from pipeline.tokenizer_files import vocabulary_hashes

# Share of right guesses at which drafting has to pay, to be tried at all: few drafts have more.
_GOOD_ACCEPTANCE = 0.9
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
    """

    def __init__(
        self, target: SlottedSession, session: DraftSession, lookup: bool, length: int | None = None
    ) -> None:
        self._session, self._lookup = session, lookup
        self._length = None if length is None else min(length, MOST_DRAFTED)
        self._row_cost = target.row_cost or 1.0
        self._costs = DraftCosts(target.call_times, session.call_times, self._row_cost)
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

    def learn(self, right: int, drafted: int) -> None:
        """Hear how many tokens of a draft were right."""
        self._costs.learn(right, drafted)

    def guesses(
        self, slot: int, read: int, token: int, most: int, begin: Callable[[], Chooser]
    ) -> list[int]:
        """What comes behind a token, as this model has it.

        Args:
            slot: of the answer.
            read: tokens that the cache holds, all of them read by the target.
            token: the next one.
            most: limit of the guesses.
            begin: gives what chooses them.
        """
        count = self._costs.length(most) if self._length is None else min(most, self._length)
        found: list[int] = []
        if count < 1:
            return found
        self._session.take_up(slot, read)
        choose = begin()
        while len(found) < count:
            guess = choose(self._session.prefill(slot, np.array([token], np.int64)))
            if guess is None:  # nothing will be chosen behind it
                break
            found.append(guess)
            token = guess
        return found


class _ModelDrafter:
    """The drafts of one answer: a `GuessingDrafter`."""

    def __init__(self, model: DraftModel, slot: int) -> None:
        self.drafted = self.taken = 0
        self._model, self._slot = model, slot
        self._begin: Callable[[], Chooser] = lambda: lambda logits: int(logits.argmax())
        self._heard = 0  # tokens of prompt and answer
        self._last = -1

    def guess_by(self, begin: Callable[[], Chooser]) -> None:
        self._begin = begin

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        right = common_length(drafted, chosen)
        self.taken += right
        self._model.learn(right, len(drafted))
        self._heard += len(chosen)
        self._last = chosen[-1] if chosen else self._last

    def draft(self, most: int) -> list[int]:
        # The model is to read the last token beside the drafts.
        found = self._model.guesses(self._slot, self._heard - 1, self._last, most, self._begin)
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
    return target, DraftModel(target, session, lookup, length)


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
