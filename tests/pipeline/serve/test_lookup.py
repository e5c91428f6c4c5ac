"""Draft tokens in the server: the same answers in fewer calls, never more than a reader takes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.runtime.drafting import PROMPT_LOOKUP
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.slots import _SlotsOneByOne, open_slots
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.runtime.tokenizer import load_tokenizer
from pipeline.serve.job import Ending, Job, Outbox
from pipeline.serve.scheduler import Scheduler
from tests.support.live_server import MODEL, LiveServer, alone, live_server
from tests.support.tiny_decoder import byte_tokenizer, shared_export, tiny_llama

NEW_TOKENS = 100


class BlockSlots(_SlotsOneByOne):
    """Slots in float32, whose answers do not depend on how many tokens a call reads."""

    def __init__(self, slots: int) -> None:
        super().__init__(TorchSession(tiny_llama()), slots)
        self.row_cost = 0.05
        self.blocks: list[int] = []
        self.is_broken = False

    def read_block(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        if self.is_broken:
            raise RuntimeError("broken")
        self.blocks.append(len(input_ids))
        return super().read_block(slot, input_ids)


def complete(server: LiveServer, prompt: str, **fields: Any) -> str:
    wanted: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS} | fields
    result = server.client().completions.create(model=MODEL, prompt=prompt, **wanted)
    return result.choices[0].text


@pytest.fixture
def slots() -> BlockSlots:
    return BlockSlots(3)


def test_an_answer_alone_is_the_same_in_fewer_calls(folder: Path, slots: BlockSlots) -> None:
    with live_server(folder, slots, slots=3, lookup=True) as server:
        assert complete(server, "abcabcabc") == alone("abcabcabc", NEW_TOKENS)
        assert complete(server, "xyz", temperature=0.5, seed=7) == alone(
            "xyz", NEW_TOKENS, Sampling(temperature=0.5), 7
        )
    assert slots.blocks
    assert min(slots.blocks) >= 2


def test_answers_together_are_those_alone(folder: Path, slots: BlockSlots) -> None:
    prompts = ["abcabcabc", "a", "ba" * 20, "hello", "abcabcabc", "zzzz"]
    with live_server(folder, slots, slots=3, lookup=True) as server, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    assert answers == [alone(prompt, NEW_TOKENS) for prompt in prompts]


def test_the_next_prompt_goes_on_from_an_answer_that_was_drafted(
    folder: Path, slots: BlockSlots
) -> None:
    with live_server(folder, slots, slots=3, lookup=True) as server:
        first = complete(server, "abcabcabc", max_tokens=50)
        longer = "abcabcabc" + first + "and"
        assert complete(server, longer, max_tokens=20) == alone(longer, 20)


def test_a_stop_string_ends_it_among_the_draft_tokens(folder: Path, slots: BlockSlots) -> None:
    free = alone("abcabcabc", NEW_TOKENS)
    stop = free[len(free) // 2 :][:2]
    with live_server(folder, slots, slots=3, lookup=True) as server:
        assert complete(server, "abcabcabc", stop=[stop]) == free[: free.index(stop)]
        assert complete(server, "abcabcabc") == free


def test_a_block_that_fails_is_decoded_token_by_token(folder: Path, slots: BlockSlots) -> None:
    slots.is_broken = True
    with live_server(folder, slots, slots=3, lookup=True) as server:
        assert complete(server, "abcabcabc") == alone("abcabcabc", NEW_TOKENS)


def test_it_is_off_unless_asked_for(folder: Path, slots: BlockSlots) -> None:
    with live_server(folder, slots, slots=3) as server:
        assert complete(server, "abcabcabc") == alone("abcabcabc", NEW_TOKENS)
    assert not slots.blocks


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_an_outbox_never_holds_more_than_it_may(
    folder: Path, slots: BlockSlots, capacity: int
) -> None:
    scheduler = Scheduler(
        slots, load_tokenizer(folder), frozenset({257}), queue=2, drafter=PROMPT_LOOKUP
    )

    async def scene() -> tuple[str, int]:
        box = Outbox(scheduler.wake, capacity)
        ids = byte_tokenizer().encode("abcabcabc")
        scheduler.submit(Job(ids, Decoding(NEW_TOKENS), box))
        texts: list[str] = []
        most = 0
        while True:
            await asyncio.sleep(0.02)
            for piece in await box.take():
                if isinstance(piece, Ending):
                    return "".join(texts), most
                assert isinstance(piece, str)
                texts.append(piece)
            most = max(most, len(box._pieces))

    try:
        text, most = asyncio.run(scene())
    finally:
        scheduler.close()
    assert most <= capacity
    assert text == alone("abcabcabc", NEW_TOKENS)


def test_the_cpu_profile_offers_blocks() -> None:
    session = open_slots(shared_export("cpu"), slots=2)
    assert session.row_cost is not None
    ids = np.array([5, 6, 7, 8, 9], np.int64)
    session.prefill(1, ids[:2])
    logits = session.read_block(1, ids[2:])
    assert session.slot_length(1) == len(ids)
    session.rewind_slot(1, 2)
    one_by_one = [session.decode([1], [int(token)])[0] for token in ids[2:]]
    np.testing.assert_allclose(logits, one_by_one, rtol=1e-4, atol=1e-4)
