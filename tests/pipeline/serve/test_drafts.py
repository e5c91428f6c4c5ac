"""A model drafts for every answer of the server, and no bit depends on that or on who else asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.runtime.draft_model import DraftModel, open_drafted
from pipeline.runtime.generate import answer
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids
from tests.support.live_server import MODEL, LiveServer, live_server
from tests.support.tiny_decoder import shared_draft, shared_export

PROMPTS = ["abcabcabc", "a", "ba" * 20, "hello", "abcabcabc", "zzzz"]
NEW_TOKENS = 40
TEMPERATURE, SEED = 0.7, 11


def complete(server: LiveServer, prompt: str, temperature: float) -> str:
    result = server.client().completions.create(
        model=MODEL, prompt=prompt, temperature=temperature, seed=SEED, max_tokens=NEW_TOKENS
    )
    return result.choices[0].text


def expected(temperature: float) -> list[str]:
    """Each answer alone, without drafts."""
    folder = shared_export("cpu")
    tokenizer, session = load_tokenizer(folder), CpuSession(folder, threads=1, steady=True)
    how = Sampling(temperature) if temperature else GREEDY
    decoding = Decoding(NEW_TOKENS, how, stop_token_ids(tokenizer, folder), seed=SEED)
    return [answer(session, tokenizer, tokenizer.encode(p), decoding).text for p in PROMPTS]


def opened(slots: int) -> tuple[CpuSession, DraftModel]:
    session, model = open_drafted(
        shared_export("cpu"), shared_draft(), threads=1, slots=slots, length=3
    )
    assert model is not None
    return session, model


@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE])
def test_answers_together_are_those_alone_without_drafts(temperature: float) -> None:
    session, model = opened(3)
    folder = shared_export("cpu")
    with (
        live_server(folder, session, source=model, slots=3) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        found = list(pool.map(lambda prompt: complete(server, prompt, temperature), PROMPTS))
    assert found == expected(temperature)
    assert model._session.call_times.medians(1)


def test_a_block_that_fails_is_decoded_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    session, model = opened(2)

    def broken(slot: int, input_ids: np.ndarray) -> np.ndarray:
        raise RuntimeError("broken")

    monkeypatch.setattr(session, "read_block", broken)
    with live_server(shared_export("cpu"), session, source=model, slots=2) as server:
        assert complete(server, PROMPTS[0], 0.0) == expected(0.0)[0]
