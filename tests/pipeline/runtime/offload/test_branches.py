"""Draft tokens that branch change no bit: of ids, logits and cache, whatever they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.runtime.draft_tree import branches_of, depths_of, parents_in_block
from pipeline.runtime.drafting import Drafter
from pipeline.runtime.generate import generate, stream_batch
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.session import Block
from tests.support.families import save_family
from tests.support.layered_model import PLACES
from tests.support.lazy_device import LazyDevice
from tests.support.scripted_drafts import PROMPT, TREES, WARM, Scripted, random_tree, said

MUCH = 50_000_000


def folder_of(model: Path, dtype: str) -> Path:
    return model if dtype == "float32" else model.parent / dtype


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    ("dtype", "how"),
    [("float32", GREEDY), ("bfloat16", GREEDY), ("float32", WARM), ("bfloat16", WARM)],
    ids=["float32", "bfloat16", "sampled", "bfloat16 sampled"],
)
def test_ids_logits_and_cache_are_those_without_drafts(
    model: Path, dtype: str, how: Sampling, device: bool
) -> None:
    place = LazyDevice() if device else None
    session = StreamedSession(folder_of(model, dtype), MUCH, PLACES, device=place)
    plain = said(session, how, None, tokens=20)
    for name, choose in TREES.items():
        before = session.traffic.passes
        drafter = Scripted(plain[0], 16, choose)
        assert said(session, how, drafter, tokens=20) == plain
        assert drafter.drafted > 0
        calls = session.traffic.passes - before
        assert (drafter.taken == 0) == (name == "wrong")
        assert calls == (1 if plain[0] else 0) + len(plain[0]) - 1 - drafter.taken


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm", "mistral"])
def test_each_token_has_the_bits_of_the_chain_that_leads_to_it(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / family, family, layers=2)
    session = StreamedSession(folder, MUCH, PLACES)
    clean = StreamedSession(folder, MUCH, PLACES)
    random = np.random.default_rng(0)
    for each in (session, clean):
        each.prefill(0, np.arange(30))
    for at in range(12):
        tree = random_tree(random.integers(0, 250, 9).tolist(), at)
        parents = parents_in_block(tree) or tuple(range(-1, len(tree)))
        ids = np.array([at, *tree])
        start = session.slot_length(0)
        end = start + 1 + max(depths_of(parents))
        for held in session.values.buffers.values():
            held[0, :, start:end] = np.nan  # as a draft may have left it
            held[0, :, end:] = 1e4
        rows = session.read_blocks([Block(0, ids, parents=parents)])[0]
        for branch in branches_of(parents):
            own = clean.read_blocks([Block(0, ids[branch])])[0]
            assert rows[branch].tobytes() == own.tobytes()
            held_alone = [
                b[0, :, : start + len(branch)].copy() for b in clean.values.buffers.values()
            ]
            clean.rewind_slot(0, start)
        session.keep_path(0, branch[1:])
        for held, alone in zip(session.values.buffers.values(), held_alone, strict=True):
            assert held[0, :, : start + len(branch)].tobytes() == alone.tobytes()
        clean.read_blocks([Block(0, ids[branch])])
        session.rewind_slot(0, start + 2)
        clean.rewind_slot(0, start + 2)


def test_trees_of_many_slots_share_a_pass_and_have_the_bits_they_have_alone(model: Path) -> None:
    together, apart = (StreamedSession(model, MUCH, PLACES, slots=4) for _ in range(2))
    random = np.random.default_rng(4)
    for turn in range(4):
        blocks, paths = [], []
        for slot in range(4):
            tree = random_tree(random.integers(0, 250, 6).tolist(), 10 * turn + slot)
            parents = parents_in_block(tree)
            ids = np.array([slot, *tree])[: 17 if slot % 2 else 5]
            if parents is not None:
                parents = parents[: len(ids)]
            blocks.append(Block(slot, ids, parents=parents))
            paths.append((branches_of(parents)[-1] if parents else list(range(len(ids))))[1:])
        found = together.read_blocks(blocks)
        for block, rows, path in zip(blocks, found, paths, strict=True):
            assert rows.tobytes() == apart.read_blocks([block])[0].tobytes()
            for session in (together, apart):
                session.keep_path(block.slot, path)
    for slot in range(4):
        length = together.slot_length(slot)
        assert length == apart.slot_length(slot) > 4
        for name, held in together.values.buffers.items():
            own = apart.values.buffers[name]
            assert held[slot, :, :length].tobytes() == own[slot, :, :length].tobytes()


def test_two_answers_in_one_pass_are_those_without_drafts(model: Path) -> None:
    how = Decoding(20, WARM, stop_ids={257})
    prompts, seeds = [PROMPT] * 3, [3, 4, 5]
    plain = [
        running.ids
        for running in stream_batch(
            StreamedSession(model, MUCH, PLACES, 2), prompts, how, seeds=seeds
        )
    ]

    class Source:
        def __init__(self, choose: str) -> None:
            self.begun = iter(plain)
            self.choose = TREES[choose]

        def begin(self, slot: int) -> Drafter:
            return Scripted(next(self.begun), 16, self.choose)

        def take_notice(self) -> str | None:
            return None

    for name in TREES:
        session = StreamedSession(model, MUCH, PLACES, 2)
        drafted = stream_batch(session, prompts, how, seeds=seeds, drafts=Source(name))
        assert [running.ids for running in drafted] == plain


def test_a_conversation_with_rewinds_goes_on_as_without_drafts(model: Path) -> None:
    sessions = [StreamedSession(model, MUCH, PLACES) for _ in range(2)]
    caches = [PrefixCache(session) for session in sessions]
    told = PROMPT
    for turn, choose in enumerate([*TREES.values()] * 2):
        how = Decoding(9, WARM, seed=turn)
        plain = list(generate(caches[0], told, how))
        drafter = Scripted(plain, 16, choose)
        drafter.heard = -len(told)
        assert list(generate(caches[1], told, how, drafter)) == plain
        assert drafter.drafted > 0
        read = min(session.length for session in sessions)
        assert sessions[0].length == sessions[1].length or read > len(told)
        for one, other in zip(*(s.values.buffers.values() for s in sessions), strict=True):
            assert one[0, :, :read].tobytes() == other[0, :, :read].tobytes()
        told = [*told[: len(told) - turn % 3], *plain[: 5 - turn % 4], 30 + turn]


def test_a_tree_that_is_deeper_than_there_is_room_is_refused_and_a_wide_one_is_not(
    model: Path,
) -> None:
    session = StreamedSession(model, MUCH, 20)
    session.prefill(0, np.arange(17))
    wide = Block(0, np.arange(9), parents=(-1, 0, 1, 0, 3, 0, 5, 0, 7))
    assert session.read_blocks([wide])[0].shape[0] == 9
    session.rewind_slot(0, 17)
    with pytest.raises(InputError, match="Too many tokens"):
        session.read_blocks([Block(0, np.arange(6), parents=(-1, 0, 1, 0, 3, 4))])
    assert session.slot_length(0) == 17
