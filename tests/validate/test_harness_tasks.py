from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lm_eval.api.task import ConfigurableTask

from pipeline.errors import InputError, UsageError
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import byte_tokenizer, tiny_llama
from validate.harness import SessionLM
from validate.harness_tasks import (
    _LOCAL_CONFIG,
    _local_task,
    _quiet_harness,
    _read_questions,
    load_tasks,
    score_tasks,
    scores_of,
    values_per_question,
)

QUESTIONS = [
    {"question": "Is water wet?", "choices": ["yes", "no"], "answer": 0},
    {"question": "2 + 2", "choices": ["3", "4", "a long wrong answer", "5"], "answer": 1},
    {"question": "Which is a whale?", "choices": ["a rock", "an orca"], "answer": 1},
    {"question": "Où?", "choices": ["là", "ici même", "nowhere"], "answer": 0},
    {"question": "First letter", "choices": ["a", "b", "c", "d"], "answer": 0},
    {"question": "Line\u2028separator", "choices": ["kept", "split"], "answer": 0},
]


@pytest.fixture
def six(tmp_path: Path) -> Path:
    path = tmp_path / "six.jsonl"
    path.write_text("\n".join(json.dumps(q, ensure_ascii=False) for q in QUESTIONS) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny() -> SessionLM:
    return SessionLM(TorchSession(tiny_llama()), byte_tokenizer())


def log_likelihoods(question: str, choices: list[str]) -> list[float]:
    """Of every choice behind the prompt of ARC, without harness and session."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    context = tokenizer.encode(f"Question: {question}\nAnswer:")
    values = []
    for choice in choices:
        ids = tokenizer.encode(" " + choice)
        with torch.no_grad():
            logits = model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        targets = torch.tensor(ids)
        values.append(-torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())
    return values


def test_accuracies_equal_those_computed_by_hand(six: Path, tiny: SessionLM) -> None:
    right, right_by_length = [], []
    for entry in QUESTIONS:
        question, choices, answer = (entry[key] for key in ("question", "choices", "answer"))
        assert isinstance(question, str)
        assert isinstance(choices, list)
        values = log_likelihoods(question, choices)
        per_byte = [v / len(c.encode()) for v, c in zip(values, choices, strict=True)]
        right.append(float(values.index(max(values)) == answer))
        right_by_length.append(float(per_byte.index(max(per_byte)) == answer))
    results = score_tasks(tiny, load_tasks([str(six)]), limit=None, num_fewshot=None)
    acc, acc_norm = scores_of(results)
    assert (acc.task, acc.metric, acc.samples) == ("six", "acc", 6)
    assert acc.value == pytest.approx(sum(right) / 6)
    assert acc_norm.value == pytest.approx(sum(right_by_length) / 6)
    assert values_per_question(results) == {"six": {"acc": right, "acc_norm": right_by_length}}
    # The error of a mean of six zeros and ones.
    assert acc.standard_error == pytest.approx((acc.value * (1 - acc.value) / 5) ** 0.5)
    assert 0 < sum(right_by_length) < 6  # or the comparison would say little


def test_limit_asks_the_first_questions_only(six: Path, tiny: SessionLM) -> None:
    everything = score_tasks(tiny, load_tasks([str(six)]), limit=None, num_fewshot=None)
    some = score_tasks(tiny, load_tasks([str(six)]), limit=2, num_fewshot=None)
    assert [score.samples for score in scores_of(some)] == [2, 2]
    for metric, values in values_per_question(some)["six"].items():
        assert values == values_per_question(everything)["six"][metric][:2]


def test_solved_examples_go_before_the_question(six: Path, tiny: SessionLM) -> None:
    results = score_tasks(tiny, load_tasks([str(six)]), limit=1, num_fewshot=2)
    assert results["n-shot"] == {"six": 2}
    context = results["samples"]["six"][0]["arguments"][0][0]
    assert context.count("Question:") == 3


def test_questions_become_the_requests_of_the_harness_own_arc_easy(six: Path) -> None:
    """The harness's arc_easy, given the same questions in the hub's layout, asks the same."""
    text = (importlib.resources.files("lm_eval") / "tasks/arc/arc_easy.yaml").read_text()
    config: dict[str, Any] = yaml.safe_load(text)
    assert config["metric_list"] == _LOCAL_CONFIG["metric_list"]
    assert config["metadata"] == _LOCAL_CONFIG["metadata"]
    for key in ("dataset_path", "dataset_name", "tag", "training_split", "validation_split"):
        del config[key]
    documents = [
        {
            "question": entry["question"],
            "choices": {"text": entry["choices"], "label": ["A", "B", "C", "D", "E"]},
            "answerKey": "ABCDE"[int(str(entry["answer"]))],
        }
        for entry in QUESTIONS
    ]
    config["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(documents)}
    with _quiet_harness():
        expected = ConfigurableTask(config=config)
    own = _local_task(six)
    for task in (own, expected):
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
    assert [i.args for i in own.instances] == [i.args for i in expected.instances]
    for mine, theirs in zip(own.test_docs(), expected.test_docs(), strict=True):
        assert own.doc_to_target(mine) == expected.doc_to_target(theirs)


@pytest.mark.slow
def test_a_task_file_of_the_harness_own_format_is_taken(tmp_path: Path, tiny: SessionLM) -> None:
    (tmp_path / "data.json").write_text('{"ask": "hello", "want": "x"}\n')
    config = {
        "task": "tiny_generation",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.json")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{ask}}",
        "doc_to_target": "{{want}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    path = tmp_path / "tiny_generation.yaml"
    path.write_text(yaml.safe_dump(config))
    results = score_tasks(tiny, load_tasks([str(path)]), limit=None, num_fewshot=None)
    (score,) = scores_of(results)
    assert (score.task, score.metric, score.value) == ("tiny_generation", "exact_match", 0.0)


LINE = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "choices"', "line 2.*|not JSON"),
        ("[]", "not a multiple-choice question"),
        (json.dumps(LINE | {"answer": 2}), "answer 2"),
        (json.dumps(LINE | {"answer": -1}), "answer -1"),
        (json.dumps(LINE | {"answer": "B"}), "answer 'B'"),
        (json.dumps(LINE | {"answer": True}), "answer True"),
        (json.dumps(LINE | {"choices": ["a"], "answer": 0}), "choices"),
        (json.dumps(LINE | {"choices": ["a", 3]}), "choices"),
        (json.dumps(LINE | {"question": None}), "question None"),
        (json.dumps({"text": "something else"}), "question None"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        _read_questions(path)
    assert str(caught.value.details["where"]) == f"{path}, line 2"


def test_missing_empty_and_undecodable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    for name, message in (
        ("none.jsonl", "cannot be read"),
        ("empty.jsonl", "no question"),
        ("latin.jsonl", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            load_tasks([str(tmp_path / name)])


def test_two_files_of_one_name_are_refused_rather_than_one_dropped(
    six: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "six.jsonl").write_text(six.read_text())
    with pytest.raises(UsageError, match="same name"):
        load_tasks([str(six), str(tmp_path / "other" / "six.jsonl")])


def test_an_unknown_task_is_refused_with_names_like_it() -> None:
    with pytest.raises(InputError, match=re.compile("no such task.*hellaswag", re.DOTALL)):
        load_tasks(["helaswag"])


def test_a_task_whose_data_is_out_of_reach_is_refused() -> None:
    with pytest.raises(InputError, match="could not be loaded") as caught:
        load_tasks(["hellaswag"])  # tests/conftest.py keeps the hub out of reach
    assert "Rowan/hellaswag" in str(caught.value.details["observed"])
    assert ".jsonl" in str(caught.value.details["change"])


def test_a_task_that_runs_code_is_refused(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(InputError, match="runs code"):
        load_tasks([str(six)])
