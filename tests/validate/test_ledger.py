from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from pipeline.errors import InputError, UsageError, ValidationError
from pipeline.folder_lock import FolderLock
from pipeline.output import partial_path
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.ledger_stages import (
    CLOSE,
    ORIGINAL,
    altered_torch,
    onnx_stage,
    outputs_alive,
    perturbed_export,
    run,
    unavailable_stage,
)
from tests.support.old_objects import old_objects_set_aside
from tests.support.tiny_decoder import tiny_llama
from validate.compare import StageLogits
from validate.greedy import GreedyAgreement, GreedyTrace
from validate.record import Ledger
from validate.report import _render_html, print_ledger, reported
from validate.stages import _SAME_IN_FLOAT32, Stage, Tolerance
from validate.verdict import Verdict


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """All kinds of rows but a failed one."""
    return run(
        ORIGINAL, onnx_stage("opset24"), onnx_stage("compat"), unavailable_stage(required=False)
    )


@pytest.fixture(scope="module")
def broken() -> Ledger:
    """The original, the original with one matrix scaled, and with one matrix of NaN."""
    return run(
        ORIGINAL,
        Stage("scaled", lambda: altered_torch(lambda weight: weight.mul_(1.5)), "original"),
        Stage("nan", lambda: altered_torch(lambda weight: weight.fill_(torch.nan)), "original"),
    )


def test_exports_of_the_model_pass(ledger: Ledger) -> None:
    assert [row.verdict.status for row in ledger.rows] == ["measured", "pass", "pass", "not run"]
    assert not ledger.failures
    ledger.require_passed()
    for row in ledger.rows[1:3]:
        assert row.to_reference is not None
        assert row.perplexity is not None
        assert ledger.rows[0].perplexity is not None
        assert row.to_reference.metrics.top1_agreement == 1
        assert row.perplexity.value == pytest.approx(ledger.rows[0].perplexity.value, rel=1e-5)


def test_polygraphys_statistics_agree_with_ours(ledger: Ledger) -> None:
    comparison = ledger.rows[1].to_reference
    assert comparison is not None
    assert comparison.batch_max_error == pytest.approx(comparison.metrics.max_error, rel=1e-6)
    assert comparison.batch_mean_error == pytest.approx(comparison.metrics.mean_error, rel=1e-3)
    assert comparison.batch_cosine == pytest.approx(1, abs=1e-6)
    assert comparison.metrics.tokens == 32 + 2 * 16


def test_greedy_answers_of_an_export_are_identical(ledger: Ledger) -> None:
    answers = ledger.rows[1].greedy_to_original
    assert answers is not None
    assert answers.identical_fraction == 1
    assert answers.first_divergence == answers.gap == [None, None]


def test_a_question_is_answered_by_every_stage_that_runs_and_shown(ledger: Ledger) -> None:
    names, said = zip(*ledger.answers, strict=True)
    assert names == ("original", "onnx opset24", "onnx compat")
    assert len(set(said)) == 1
    assert said[0]
    page, file = _render_html(ledger), io.StringIO()
    print_ledger(ledger, file)
    for shown in (page, file.getvalue()):
        assert "What is a whale?" in shown
    assert Ledger.from_json(ledger.to_json()).answers == ledger.answers


def test_a_wrong_matrix_in_an_export_fails(tmp_path: Path) -> None:
    folder = perturbed_export(tmp_path / "onnx", "opset24")
    stage = Stage("broken", lambda: OnnxSession(folder), "original", CLOSE)
    ledger = run(ORIGINAL, stage)
    assert [row.verdict.status for row in ledger.rows] == ["measured", "fail"]
    assert [row.name for row in ledger.failures] == ["broken"]
    with pytest.raises(ValidationError, match=r"0\.99999 is demanded") as failure:
        ledger.require_passed()
    assert failure.value.exit_status == 5


def test_a_changed_torch_weight_is_measured_by_every_column(broken: Ledger) -> None:
    row = broken.rows[1]
    assert row.verdict.status == "measured"
    assert row.to_original is not None
    assert row.greedy_to_original is not None
    assert row.perplexity_change is not None
    assert row.to_original.metrics.kl_mean > 1e-3
    assert row.to_original.metrics.top1_agreement < 1
    assert row.perplexity_change.log_ratio != 0
    answers = row.greedy_to_original
    assert answers.identical_fraction < 1
    for step, gap, margin in zip(
        answers.first_divergence, answers.gap, answers.other_margin, strict=True
    ):
        assert (step is None) == (gap is None) == (margin is None)
        assert gap is None or gap > 0


@pytest.mark.parametrize(
    ("tolerance", "status"),
    [
        (Tolerance(max_kl=100), "pass"),
        (Tolerance(max_kl=1e-6), "fail"),
        (Tolerance(max_relative_error=10), "pass"),
        (Tolerance(max_relative_error=1e-6), "fail"),
        (Tolerance(min_cosine=-1), "pass"),
        (Tolerance(max_kl_to_reference=100), "pass"),
        (Tolerance(max_kl_to_reference=1e-6), "fail"),
    ],
)
def test_each_tolerance_decides(broken: Ledger, tolerance: Tolerance, status: str) -> None:
    row = broken.rows[1]
    assert row.perplexity is not None
    verdict = Verdict.judge(tolerance, row.to_reference, row.to_original)
    assert verdict.status == status
    assert verdict.counts_as_failure == bool(verdict.reasons) == (status == "fail")


def test_the_tolerance_of_a_stage_decides() -> None:
    ledger = run(ORIGINAL, dataclasses.replace(onnx_stage(), tolerance=Tolerance(max_kl=-1)))
    assert ledger.rows[1].verdict.status == "fail"
    assert "KL to the original" in ledger.rows[1].verdict.reasons[0]


def test_a_limit_on_kl_holds_for_tokens_behind_a_cache_too(ledger: Ledger, broken: Ledger) -> None:
    near, far = (rows[1].cached_to_original for rows in (ledger.rows, broken.rows))
    for cached, status in ((near, "pass"), (far, "fail")):
        verdict = Verdict.judge(Tolerance(max_kl=1e-6), None, near, cached=(None, cached))
        assert verdict.status == status
    assert "token behind a cache" in verdict.reasons[0]


def test_nan_fails_even_where_nothing_is_demanded(broken: Ledger) -> None:
    verdict = broken.rows[2].verdict
    assert verdict.status == "fail"
    assert "NaN" in verdict.reasons[0]


def test_a_stage_that_cannot_run_is_a_row_and_fails_if_required() -> None:
    optional = dataclasses.replace(unavailable_stage(required=False), reference=None)
    required = dataclasses.replace(unavailable_stage(required=True), reference=None)
    row = run(optional).rows[0]
    assert row.verdict.status == "not run"
    assert "no GPU" in row.verdict.reasons[0]
    assert not run(optional).failures
    assert run(required).failures
    assert run(optional, strict=True).failures


def test_a_crash_in_one_stage_costs_only_its_row() -> None:
    def crash() -> OnnxSession:
        raise RuntimeError("boom")

    ledger = run(ORIGINAL, Stage("crash", crash, "original", required=False), onnx_stage())
    assert [row.verdict.status for row in ledger.rows] == ["measured", "not run", "pass"]
    assert "boom" in ledger.rows[1].verdict.reasons[0]
    assert ledger.failures == [ledger.rows[1]]


def test_a_stage_whose_reference_did_not_run_is_not_passed() -> None:
    follower = dataclasses.replace(onnx_stage(), reference="engine")
    rows = run(ORIGINAL, unavailable_stage(required=False), follower).rows
    assert rows[2].verdict.status == "fail"
    assert "reference did not run" in rows[2].verdict.reasons[0]
    assert rows[2].to_original is not None


def test_stages_in_an_impossible_order_are_refused() -> None:
    with pytest.raises(UsageError, match="does not come before"):
        run(onnx_stage(), ORIGINAL)
    with pytest.raises(UsageError, match="same name"):
        run(ORIGINAL, ORIGINAL)


def test_logits_are_freed_when_no_later_stage_needs_them() -> None:
    alive = []

    def opener() -> TorchSession:
        alive.append(outputs_alive())
        return TorchSession(tiny_llama())

    references = {"a": None, "b": "a", "c": "b", "d": "b", "e": "a"}
    with old_objects_set_aside():
        run(*(Stage(name, opener, reference) for name, reference in references.items()))
        assert alive == [0, 1, 2, 2, 1]
        assert outputs_alive() == 0


def test_a_stage_beyond_its_tolerance_has_polygraphys_verdict_beside_ours() -> None:
    def scaled() -> TorchSession:
        return altered_torch(lambda weight: weight.mul_(1.5))

    rows = run(ORIGINAL, Stage("scaled", scaled, "original", CLOSE), onnx_stage()).rows
    found = [row.to_reference for row in rows[1:]]
    assert [one.polygraphy_passed for one in found if one is not None] == [False, True]
    # One of prompts, one of tokens behind a cache.
    assert [len(row.verdict.reasons) for row in rows] == [0, 2, 0]


def test_json_round_trip_keeps_everything(ledger: Ledger) -> None:
    text = json.dumps(ledger.to_json(), allow_nan=False)
    assert Ledger.from_json(json.loads(text)) == ledger
    assert json.loads(text)["provenance"]["tool"] == "skipcat"


def test_json_of_nan_is_valid_json(broken: Ledger) -> None:
    text = json.dumps(broken.to_json(), allow_nan=False)
    metrics = Ledger.from_json(json.loads(text)).rows[2].to_original
    assert metrics is not None
    assert np.isnan(metrics.metrics.min_cosine)


def test_another_schema_is_refused(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="schema 1"):
        Ledger.from_json(ledger.to_json() | {"schema": 2})


def test_html_names_every_stage_and_needs_no_other_file(ledger: Ledger) -> None:
    page = _render_html(ledger)
    for row in ledger.rows:
        assert f"<td>{row.name}</td>" in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "There is no GPU here." in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_html_escapes_names() -> None:
    stage = dataclasses.replace(unavailable_stage(required=False), name="<script>", reference=None)
    page = _render_html(run(stage))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_html_is_drawn_when_nothing_ran_or_values_are_nan(broken: Ledger) -> None:
    assert "</html>" in _render_html(broken)
    nothing = dataclasses.replace(unavailable_stage(required=True), reference=None)
    assert "</html>" in _render_html(run(nothing))


def test_table_names_every_stage_and_every_reason(ledger: Ledger) -> None:
    file = io.StringIO()
    print_ledger(ledger, file)
    text = file.getvalue()
    for row in ledger.rows:
        assert row.name in text
    assert "not run: engine: There is no GPU here." in text


def test_reports_appear_together_and_do_not_replace_without_leave(
    ledger: Ledger, tmp_path: Path
) -> None:
    assert reported(lambda: ledger, tmp_path / "ledger") is ledger
    assert sorted(path.name for path in (tmp_path / "ledger").iterdir()) == [
        "ledger.html",
        "ledger.json",
    ]


@pytest.mark.parametrize(
    ("way", "says"), [("is there", "exists already"), ("is being written", "Another run")]
)
def test_where_the_reports_could_not_be_written_nothing_is_measured(
    way: str, says: str, tmp_path: Path
) -> None:
    output = tmp_path / "ledger"
    with contextlib.ExitStack() as stack:
        if way == "is there":
            output.mkdir()
            (output / "mine.txt").write_text("mine")
        else:
            stack.enter_context(FolderLock(partial_path(output)))
        with pytest.raises(UsageError, match=says):
            reported(lambda: pytest.fail("a stage was run"), output)


def test_nothing_is_printed_while_stages_run(capsys: pytest.CaptureFixture[str]) -> None:
    run(ORIGINAL, Stage("again", ORIGINAL.open, "original", CLOSE))
    assert capsys.readouterr().out == ""


class _Forgetful(TorchSession):
    """Right for a prompt; whatever comes behind it is read as if nothing were in the cache."""

    def logits(self, input_ids: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        self._cache = DynamicCache(config=self.model.config)
        return super().logits(input_ids, last_only)


def test_a_stage_that_is_right_for_prompts_alone_fails() -> None:
    forgetful = Stage("forgetful", lambda: _Forgetful(tiny_llama()), "original", _SAME_IN_FLOAT32)
    row = run(ORIGINAL, forgetful).rows[1]
    assert row.to_reference is not None
    assert row.to_reference.metrics.min_cosine > 0.99999
    assert row.verdict.status == "fail"
    reasons = " ".join(row.verdict.reasons)
    assert "token behind a cache" in reasons
    assert "greedy answers part" in reasons
    assert "there is no tie" in reasons


def test_answers_that_part_at_a_tie_do_not_fail() -> None:
    def traces(token: int, gap: float | None) -> list[GreedyTrace]:
        return [GreedyTrace([7, token], [3.0, 1e-4], {"other": gap}, [10.0, 10.0])]

    tie = GreedyAgreement.of("other", traces(1, 1e-4), traces(2, None))
    assert tie.complaints(1e-3) == []
    sure = GreedyAgreement.of("other", traces(1, 0.5), traces(2, None))
    assert "after 1 tokens" in sure.complaints(1e-3)[0]
    lost = GreedyAgreement.of("other", traces(1, float("nan")), traces(2, None))
    assert lost.complaints(1e-3)


def test_figures_that_only_unseen_messages_have_are_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 4, 9)).astype(np.float32)
    stages = [
        StageLogits.of(name, lambda ids: logits, [np.zeros((1, 4), np.int64)]) for name in "ab"
    ]
    expected = stages[0].compare(stages[1], Tolerance(min_cosine=0.5))

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("a quantile was computed")

    monkeypatch.setattr(np, "quantile", refuse)
    assert stages[0].compare(stages[1], Tolerance(min_cosine=0.5)) == expected
