"""On the real model, the searched plan is worth its name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pipeline.calibrate.sampled_text import sampled_windows
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import decoder_structure

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m"
LENGTH = 256


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(MODEL)


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel) -> tuple[TokenBatch, torch.Tensor]:
    """24 windows to calibrate on, and 4 others to test on, all from the model itself."""
    tokens = sampled_windows(loaded.model, loaded.tokenizer, count=28, length=LENGTH, seed=0)
    return TokenBatch(tokens[:24], "self", 0), tokens[24:]


def compressed_kl(
    method: str, loaded: LoadedModel, texts: tuple[TokenBatch, torch.Tensor], folder: Path
) -> float:
    """KL(original || compressed), nats per token, on the windows not calibrated on."""
    calibration, tests = texts
    request = CompressRequest(MODEL, 0.8, method=method, effort="fast", windows=24)
    model = copy.deepcopy(loaded.model)
    layers = decoder_structure(model)
    costs = LayerCosts(folder / method, {})
    ready = CalibratedDecoder(model, layers, lambda: calibration, lambda batch: costs)
    plan = make_plan(request, ready)
    ready.measure(request)
    assert 0.79 < plan.kept_fraction <= 0.8
    fit = request.resolved_method.fit
    compress_(ready, plan, dtype=torch.float32, fit=fit)
    with torch.no_grad():
        expected = loaded.model(tests).logits.log_softmax(-1)
        actual = model(tests).logits.log_softmax(-1)
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


@pytest.mark.timeout(3600)
def test_the_searched_plan_costs_far_less_than_skipcat_at_the_same_size(
    loaded: LoadedModel, texts: tuple[TokenBatch, torch.Tensor], tmp_path: Path
) -> None:
    ours = compressed_kl("skipcat-kl", loaded, texts, tmp_path)
    assert ours < 0.6 * compressed_kl("skipcat", loaded, texts, tmp_path)
