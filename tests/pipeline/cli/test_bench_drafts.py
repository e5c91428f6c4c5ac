"""`skipcat bench --draft`: figures that agree with each other, and flags that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench.answering import _Watched
from pipeline.bench.drafting import _acceptance, _by_branches
from pipeline.cli.main import main
from pipeline.runtime.draft_tree import Draft
from tests.support.layered_model import draft_of, shared_layers
from tests.support.tiny_decoder import shared_draft, shared_export

QUICK = ["--new-tokens", "12", "--rounds", "2", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["320KB", None])
def test_ways_take_turns_and_their_figures_agree(
    memory: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, draft = shared_layers(), draft_of(shared_layers())
    if memory is None:
        model, draft = shared_export("cpu"), shared_draft()
    result, prompts = tmp_path / "drafted.json", tmp_path / "prompts.txt"
    prompts.write_text("abcabcabc\n\nhello\n")
    flags = ["--draft-tokens", "3", "--prompts", str(prompts), "--json", str(result)]
    budget = [] if memory is None else ["--memory", memory]
    assert main(["bench", str(model), "--draft", str(draft), *budget, *flags, *QUICK, "-v"]) == 0
    out, err = capsys.readouterr()
    assert err.count("round 2") == 3
    assert "KL" in err
    record = json.loads(result.read_text())
    assert str(model.parent) not in result.read_text()
    plain, drafted, alone = record["rows"]
    assert [row["way"] for row in record["rows"]] == ["plain", "drafted", "draft alone"]
    for row in record["rows"]:
        assert row["way"] in out
        rate = row["tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["tokens_per_call"] == pytest.approx(row["tokens"] / row["calls"])
        assert row["peak_bytes"] > 20e6
    # Two prompts in two rounds; the first token of each answer comes with the prompt.
    assert plain["tokens"] <= 2 * 2 * 11
    assert plain["acceptance"] == alone["acceptance"] == []
    assert drafted["drafted"] > 0
    assert drafted["acceptance"][0]["depth"] == 1
    assert sum(of["taken"] for of in drafted["acceptance"]) == drafted["taken"]
    assert drafted["calls"] == drafted["tokens"] - drafted["taken"]
    assert sum(of["taken"] for of in drafted["branches"]) == drafted["taken"]
    assert sum(of["drafted"] for of in drafted["branches"]) == drafted["drafted"]
    most = max(of["branches"] for of in drafted["branches"])
    assert ("by their branches" in err) == (most > 1) == (memory is not None)
    assert drafted["shares"]["draft"] > 0
    assert (drafted["read_bytes_per_token"] > 0) == (memory is not None)
    assert (drafted["shares"]["wait"] > 0) == (memory is not None)
    assert record["ratio"] == drafted["tokens_per_s"]["median"] / plain["tokens_per_s"]["median"]
    assert record["draft_alone"]["kl_mean"] > 0
    assert 0 <= record["draft_alone"]["top1_agreement"] <= 1


def test_acceptance_is_counted_by_depth_as_far_as_it_was_looked_at() -> None:
    watched = _Watched(None)
    for drafted, chosen in (([1, 2, 3], [1, 2, 9]), ([1, 2, 3], [7]), ([4], [4, 5]), ([], [6])):
        watched.learn(drafted, chosen)
    assert watched.depths == [[3, 2], [1, 1], [1, 0]]
    assert watched.taken == 3
    assert watched.branches == {1: [3, 7, 3]}
    tree = Draft([1, 2, 3, 4], [-1, 0, -1, 2])
    watched.learn(tree, [3, 4, 5])
    watched.learn(tree, [3, 9])
    assert watched.depths == [[5, 4], [3, 2], [1, 0]]
    assert watched.branches == {1: [3, 7, 3], 2: [2, 8, 3]}
    rows = _by_branches([[[1, 3, 7, 3]], [[1, 1, 2, 2], [2, 1, 4, 0]]])
    assert [list(row.values()) for row in rows] == [[1, 4, 9, 5], [2, 1, 4, 0]]
    shares = [of["share"] for of in _acceptance([watched.depths, [[1, 1]]])]
    assert shares == [5 / 6, 2 / 3, 0]


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["MODEL", "MODEL", "--draft", "DRAFT"], 2, "2 folders"),
        (["--draft", "DRAFT"], 2, "0 folders"),
        (["MODEL", "--draft", "DRAFT", "--predict", "orin-nano-8gb"], 2, "--predict"),
        (["MODEL", "--draft", "DRAFT", "--shape", "llama-3.2-1b"], 2, "--shape"),
        (["MODEL", "--draft", "DRAFT", "--prompt-tokens", "9"], 2, "--prompt-tokens"),
        (["MODEL", "--draft", "DRAFT", "--device", "cuda"], 2, "--device"),
        (["MODEL", "--memory", "1GB"], 2, "are for --draft"),
        (["MODEL", "--draft-width", "2"], 2, "are for --draft"),
        (["MODEL", "--draft", "DRAFT", "--draft-tokens", "2", "--draft-width", "2"], 2, "chain"),
        (["MODEL", "--draft", "DRAFT", "--prompts", "EMPTY"], 2, "no prompt"),
        (["MODEL", "--draft", "OTHER"], 3, "does not fit"),
    ],
)
def test_what_does_not_go_together_is_refused(
    flags: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    places = {
        "MODEL": str(shared_export("cpu")),
        "DRAFT": str(shared_draft()),
        "OTHER": str(draft_of(shared_layers())),
        "EMPTY": str(empty),
    }
    assert main(["bench", *(places.get(flag, flag) for flag in flags)]) == status
    assert message in " ".join(capsys.readouterr().err.split())
