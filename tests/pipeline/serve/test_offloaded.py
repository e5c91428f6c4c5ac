"""A server whose model is read from disk: answers share its passes, and no bit depends on that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from pipeline.runtime.drafting import PROMPT_LOOKUP, DraftSource
from pipeline.runtime.generate import answer
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.offload.streamed_session import StreamedSession
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.session import Block
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids
from tests.support.layered_model import DEPTH, draft_of, shared_layers
from tests.support.live_server import MODEL, live_server

PROMPTS = ["abcabcabc", "a", "ba" * 40, "hello", "abcabcabc", "zzzz"]
NEW_TOKENS, SEED = 24, 11
WARM = Sampling(0.7)
SLOTS = 3
# In which a layer stays, without a draft and, in a shorter cache, beside one.
MEMORY = {False: "700KB", True: "460KB"}


def opened(draft: bool) -> tuple[StreamedSession, DraftSource | None]:
    model = shared_layers()
    small = draft_of(model) if draft else None
    session, source = open_offloaded(model, MEMORY[draft], small, threads=1, slots=SLOTS, length=3)
    assert 0 < session.traffic.resident < DEPTH
    return session, source


def expected() -> list[str]:
    """Each answer alone, without drafts."""
    folder = shared_layers()
    tokenizer, (session, _) = load_tokenizer(folder), opened(draft=True)
    decoding = Decoding(NEW_TOKENS, WARM, stop_token_ids(tokenizer, folder), seed=SEED)
    return [answer(session, tokenizer, tokenizer.encode(p), decoding).text for p in PROMPTS]


def complete(client: openai.OpenAI, model: str, prompt: str) -> str:
    result = client.completions.create(
        model=model, prompt=prompt, temperature=0.7, seed=SEED, max_tokens=NEW_TOKENS
    )
    return result.choices[0].text


@pytest.mark.parametrize("way", ["plain", "lookup", "draft"])
def test_answers_that_share_passes_are_those_alone(way: str) -> None:
    session, source = opened(way == "draft")
    alone = expected()
    before = session.traffic.passes
    settings = {"lookup": way == "lookup", "slots": SLOTS, "prefill_chunk": 256, "reuse": False}
    with (
        live_server(shared_layers(), session, source=source, **settings) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        begun = threading.Barrier(6)

        def ask(prompt: str) -> str:
            begun.wait()
            return complete(server.client(), MODEL, prompt)

        assert list(pool.map(ask, PROMPTS)) == alone
        assert server.scheduler._drafter == {"lookup": PROMPT_LOOKUP, "draft": source}.get(way)
    # One after the other each answer would take a pass a token, and one for its prompt.
    assert session.traffic.passes - before < 0.6 * len(PROMPTS) * NEW_TOKENS


def test_a_pass_that_fails_is_tried_for_each_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    session, source = opened(draft=True)
    alone = expected()
    real = session.read_blocks

    def broken(blocks: Sequence[Block]) -> list[np.ndarray]:
        if len(blocks) > 1:
            raise RuntimeError("broken")
        if len(blocks[0].ids) == len(PROMPTS[1]):  # the prompt of one letter never succeeds
            raise RuntimeError("broken")
        return real(blocks)

    monkeypatch.setattr(session, "read_blocks", broken)
    with (
        live_server(
            shared_layers(), session, source=source, slots=SLOTS, prefill_chunk=256, reuse=False
        ) as server,
        ThreadPoolExecutor(6) as pool,
    ):

        def ask(prompt: str) -> str | int:
            try:
                return complete(server.client(), MODEL, prompt)
            except openai.APIStatusError as error:
                return error.status_code

        found = list(pool.map(ask, PROMPTS))
    assert [text for text in found if text != 500] == [
        t for t, f in zip(alone, found, strict=True) if f != 500
    ]
    assert found[1] == 500


def test_the_command_serves_a_model_under_a_budget_with_a_draft() -> None:
    model = shared_layers()
    command = ["serve", str(model), "--memory", MEMORY[True], "--draft", str(draft_of(model))]
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", *command, "--port", "0", "--slots", str(SLOTS)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        assert child.stderr is not None
        said = ""
        for line in child.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+/v1", line):
                break
        assert found
        assert "layers stay in memory" in said
        client = openai.OpenAI(base_url=found[0], api_key="none", max_retries=0)
        with ThreadPoolExecutor(6) as pool:
            texts = list(pool.map(lambda p: complete(client, model.name, p), PROMPTS))
        assert texts == expected()
        child.terminate()
        assert "Traceback" not in child.stderr.read()
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
