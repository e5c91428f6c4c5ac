"""A checkpoint under a budget, alone or with a draft over its cache: opened, asked, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.main import main
from pipeline.errors import InputError, PipelineError, UsageError
from pipeline.runtime.generate import generate, stream_batch
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from tests.support.layered_model import DEPTH, PLACES, draft_of
from tests.support.scripted_drafts import WARM, said

LAYERS = DEPTH
# In which some layers stay beside the draft.
MEMORY, NARROW = "320KB", "240KB"
ALONE = "420KB"


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["model", "bfloat16"])
def test_a_model_drafts_into_the_cache_and_changes_no_bit(
    model: Path, dtype: str, how: Sampling
) -> None:
    folder, answers = model.parent / dtype, []
    memory = MEMORY if dtype == "model" else NARROW
    for length, width in ((0, 4), (1, 4), (2, 2), (3, 1), (7, 4), (16, 3), (None, 1), (None, 4)):
        session, drafts = open_offloaded(
            folder, memory, draft_of(model), threads=1, length=length, width=width
        )
        assert 0 < session.traffic.resident < LAYERS
        assert drafts is not None
        drafter = drafts.begin(0)
        answers.append(said(session, how, drafter, tokens=20))
        assert (drafter.drafted > 0) == (length != 0)
        session.close()
    assert answers == [answers[0]] * len(answers)


def test_the_draft_reads_no_prompt_and_saves_calls(model: Path) -> None:
    session, drafts = open_offloaded(model, MEMORY, draft_of(model), threads=1, length=4, width=1)
    assert drafts is not None
    assert isinstance(drafts._session, CpuSession)
    assert drafts._session.values is session.values
    drafter = drafts.begin(0)
    before = session.traffic.passes
    ids, _ = said(session, GREEDY, drafter)
    # Its weights are the model's in 4 bits: of these numbers it guesses more than it misses.
    assert drafter.taken > 0.3 * drafter.drafted
    assert session.traffic.passes - before == 1 + len(ids) - 1 - drafter.taken
    assert set(drafts._session.call_times.medians(999)) == {1}


def test_trees_give_a_call_more_tokens_than_chains_of_as_many(model: Path) -> None:
    taken = {}
    for width in (1, 4):
        session, drafts = open_offloaded(
            model, MEMORY, draft_of(model), threads=1, length=16, width=width
        )
        assert drafts is not None
        drafter, before = drafts.begin(0), session.traffic.passes
        said(session, GREEDY, drafter, tokens=60)
        taken[width] = drafter.taken / (session.traffic.passes - before)
        assert (max(drafts._session.call_times.medians(999)) > 1) == (width > 1)  # read again
    assert taken[4] > taken[1]


def test_answers_in_slots_are_those_alone_and_go_on_to_the_end_of_the_cache(model: Path) -> None:
    prompts = [[5, 6, 7, 8], [9], list(range(40, 150)), [8, 8]]
    memory = "420KB"  # for two rows
    session, drafts = open_offloaded(model, memory, draft_of(model), threads=1, slots=2)
    assert 0 < session.traffic.resident < LAYERS
    how = Decoding(24, WARM)
    together = stream_batch(session, prompts, how, seeds=[3] * len(prompts), drafts=drafts)
    before = session.traffic.passes
    alone, _ = open_offloaded(model, memory, draft_of(model), threads=1)
    for running, prompt in zip(together, prompts, strict=True):
        alone.reset()
        ids = list(generate(alone, prompt, Decoding(24, WARM, seed=3)))
        assert running.ids == ids
        assert running.ending == ("context" if len(prompt) == 110 else "length")
        assert len(ids) == (PLACES + 1 - 110 if len(prompt) == 110 else 24)
    assert session.traffic.passes - before < alone.traffic.passes / 2  # two slots, and drafts


def test_a_conversation_with_rewinds_goes_on_as_without_drafts(model: Path) -> None:
    session, drafts = open_offloaded(model, MEMORY, draft_of(model), threads=1, length=9)
    other, _ = open_offloaded(model, MEMORY, draft_of(model), threads=1)
    assert drafts is not None
    caches, told = [PrefixCache(session), PrefixCache(other)], [1, 2, 3, 4]
    for turn in range(3):
        answers = [
            list(generate(cache, told, Decoding(9, WARM, seed=turn), drafter))
            for cache, drafter in zip(caches, (drafts.begin(0), None), strict=True)
        ]
        assert answers[0] == answers[1]
        told = [*told[: len(told) - turn], *answers[0], 30 + turn]


def test_a_language_model_answers_alike_with_drafts_and_without(model: Path) -> None:
    plain = LanguageModel.open(model, memory=ALONE, drafter=None)
    looking = LanguageModel.open(model, memory=ALONE)
    helped = LanguageModel.open(model, memory=ALONE, draft=draft_of(model), threads=1)
    prompt = "abcabcabcabc"
    expected = plain.generate(prompt, Decoding(20))
    for other in (looking, helped):
        found = other.generate(prompt, Decoding(20))
        assert found.text == expected.text
        assert found.drafted_tokens > 0
        assert other.traffic["passes"] < plain.traffic["passes"]
    with pytest.raises(UsageError, match="runs on the CPU"):
        LanguageModel.open(model, memory=ALONE, device="cuda")


def test_the_command_answers_and_says_what_was_read(
    model: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["run", str(model), "--memory", MEMORY, "--draft", str(draft_of(model))]
    how = ["-p", "Hello", "--max-new-tokens", "6", "--threads", "1"]
    assert main([*given, *how, "--json"]) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert answer["traffic"]["read_bytes"] > answer["traffic"]["pass_bytes"] > 0
    assert answer["traffic"]["peak_bytes"] > 1e6
    assert "layers stay in memory" in err
    assert main([*given, *how]) == 0
    assert "read from disk" in capfd.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\nwhat else\n")
    assert main([*given, "--prompts", str(prompts), "--batch-size", "1", *how[2:], "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert json.loads(lines[0])["text"] == answer["text"]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--memory", "9KB"], 2, "at least"),
        (["--memory", "some"], 2, "no number of bytes"),
        (["--memory", "1GB", "--backend", "onnx"], 2, "are for a checkpoint"),
        (["--memory", "1GB", "--device", "cuda"], 2, "runs on the CPU"),
        (["--memory", "1GB", "--draft", "MODEL"], 2, "two exports of the profile"),
        (["--memory", "1GB", "--draft", "OTHER"], 3, "vocab_size 99"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: list[str],
    status: int,
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = shutil.copytree(draft_of(model), tmp_path / "other")
    record = json.loads((other / "export.json").read_text())
    (other / "export.json").write_text(json.dumps(record | {"vocab_size": 99}))
    places = {"MODEL": str(model), "OTHER": str(other)}
    given = [places.get(flag, flag) for flag in flags]
    assert main(["run", str(model), "-p", "Hello", *given]) == status
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_export_is_not_offloaded_and_a_draft_of_another_kind_does_not_fit(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="are for a checkpoint"):
        open_offloaded(draft_of(model), MEMORY)
    other = shutil.copytree(draft_of(model), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 7}}))
    with pytest.raises(InputError, match="other angles"):
        open_offloaded(model, MEMORY, other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match="tokenizer is another"):
        open_offloaded(model, MEMORY, other)
    narrow = shutil.copytree(model, tmp_path / "narrow")
    fields = json.loads((narrow / "config.json").read_text())
    fields |= {"max_position_embeddings": PLACES - 1}
    (narrow / "config.json").write_text(json.dumps(fields))
    with pytest.raises(PipelineError, match="does not fit"):
        open_offloaded(narrow, MEMORY, draft_of(model))


def test_a_draft_that_knows_nothing_of_the_model_changes_no_bit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, drafts = open_offloaded(model, MEMORY, draft_of(model), threads=1, length=3)
    assert drafts is not None
    assert isinstance(drafts._session, CpuSession)
    random = np.random.default_rng(0)
    own = drafts._session._run

    def other(row: int, ids: np.ndarray, first: np.ndarray) -> np.ndarray:
        return random.permuted(own(row, ids, first), axis=-1)

    monkeypatch.setattr(drafts._session, "_run", other)
    drafter = drafts.begin(0)
    found = said(session, GREEDY, drafter)
    assert drafter.taken < 0.2 * drafter.drafted
    assert found == said(session, GREEDY, None)
