"""What a compression would take, held against compressions that were done."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from pipeline.calibrate.text import TokenBatch
from pipeline.compress import estimate as module
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.estimate import LIBRARIES_BYTES, Estimate, estimated
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.compress.request import CompressRequest
from pipeline.compress.timed_layer import Timing
from pipeline.compress.walk import compress_
from pipeline.errors import InputError, UsageError
from pipeline.model.structure import decoder_structure

LAYERS = 3
REQUEST = CompressRequest(
    "of-this-form", keep_params=0.6, effort="fast", calibration="a.txt", windows=8, window_length=64
)


def config(**changes: Any) -> LlamaConfig:
    """Three layers, 128 wide."""
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return LlamaConfig(**sizes | changes)


def done(request: CompressRequest) -> Timing:
    """The tasks of a model that was compressed whole."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    layers, timing = decoder_structure(model), Timing()
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        costs = LayerCosts(Path(folder), {})
        costs.measure(model, layers, tokens, CostRequest.of(request), timing)
        batch = TokenBatch(tokens, "random", 0)
        ready = CalibratedDecoder.at_hand(
            model, layers, batch, costs, workers=timing, surveyed=len(tokens)
        )
        plan = make_plan(request, ready)
        fit = request.resolved_method.fit
        compress_(ready, plan, dtype=torch.float16, fit=fit)
    return timing


@pytest.fixture(scope="module")
def tasks() -> Timing:
    return done(REQUEST)


@pytest.fixture(scope="module")
def found() -> Estimate:
    return estimated(config(), REQUEST, workers=2, threads=1)


def test_tasks_and_bytes_are_those_of_a_model_that_was_compressed(
    tasks: Timing, found: Estimate
) -> None:
    """A layer as wide as the model's own is timed, so that they differ by its random numbers."""
    assert found.timed_width == found.widest == 256
    moved = sum(task.own_bytes for task in tasks.tasks)
    # A layer's weights, forward and back, however many batches of text go through it.
    moved += sum({task.where: task.weight_bytes for task in tasks.tasks}.values())
    assert found.moved_bytes == pytest.approx(moved, rel=0.15)
    assert found.tasks == pytest.approx(len(tasks.tasks), rel=0.2)


def test_the_largest_worker_holds_what_its_task_declares_and_what_it_is_given(
    tasks: Timing, found: Estimate
) -> None:
    largest = max(task.process_bytes(1, 1) for task in tasks.tasks)
    assert found.worker_bytes == pytest.approx(largest + LIBRARIES_BYTES, rel=0.02)


def test_disk_is_what_survey_layers_and_checkpoint_take(found: Estimate) -> None:
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    windows = REQUEST.resolved_effort.survey_windows
    tokens = windows * REQUEST.resolved_effort.window_length
    survey = LayerCosts.disk_bytes(decoder_structure(model.eval()), tokens, True)
    assert found.disk_bytes == survey + 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("field", ["moved_bytes", "worker_bytes", "disk_bytes"])
def test_a_narrower_layer_that_is_timed_says_the_same_of_bytes(
    field: str, found: Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WIDEST", 128)
    other = estimated(config(), REQUEST, workers=2, threads=1)
    assert (other.timed_width, other.widest) == (128, 256)
    assert getattr(other, field) == pytest.approx(getattr(found, field), rel=0.15)


def test_more_workers_take_no_longer_and_the_head_is_the_least(found: Estimate) -> None:
    timed = module.timed_layer
    kept: list[Any] = []

    def once(*arguments: Any) -> Any:
        kept.append(timed(*arguments)) if not kept else None
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "timed_layer", once)
        hours = [estimated(config(), REQUEST, n, 1).hours for n in (0, 1, 2, 8, 1000)]
        alone = estimated(config(), REQUEST, 0, 1)
    assert hours == sorted(hours, reverse=True)
    assert alone.hours == pytest.approx(alone.head_hours + alone.task_hours)
    assert hours[-1] >= alone.head_hours * (1 - 1e-9)
    assert alone.moved_bytes == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"effort": "default"},
        {"effort": "max"},
        {"one_shot": True, "effort": "default"},
        {"memory": "150KB"},
        {"keep_bytes": 0.4, "runtime": "any"},
        {"keep_params": 0.5, "keep_cache": 0.5},
    ],
    ids=str,
)
def test_any_request_that_surveys_a_model_is_estimated(changes: dict[str, Any]) -> None:
    wanted = estimated(config(), replace(REQUEST, **changes), workers=2, threads=1)
    assert 0 < wanted.head_hours < 1
    assert 0 < wanted.task_hours < 1
    assert wanted.hours <= wanted.head_hours + wanted.task_hours


def test_a_config_with_sizes_of_other_names_is_refused() -> None:
    with pytest.raises(InputError, match="no intermediate_size"):
        estimated(GPT2Config(), REQUEST, workers=2, threads=1)


def test_a_method_without_a_survey_is_refused() -> None:
    with pytest.raises(UsageError, match="--method svd-llm"):
        estimated(config(), replace(REQUEST, method="svd-llm"), workers=2, threads=1)
