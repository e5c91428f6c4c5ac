"""Surveys of the tiny families, each measured once for all tests."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.model.structure import Layer, decoder_structure
from tests.support.families import tiny_model

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Surveyed:
    """A model with its structure and its survey; not to be written to."""

    model: PreTrainedModel
    layers: list[Layer]
    survey: LayerCosts


@functools.cache
def surveyed(family: str) -> Surveyed:
    """The tiny model of a family, surveyed on TOKENS."""
    folder = Path(tempfile.mkdtemp(prefix="skipcat-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = tiny_model(family)
    layers = decoder_structure(model)
    survey = LayerCosts(folder, {})
    survey.measure(model, layers, TOKENS, CostRequest())
    return Surveyed(model, layers, survey)


def calibrated(
    model: PreTrainedModel,
    layers: list[Layer],
    costs: LayerCosts | None = None,
    tokens: torch.Tensor = TOKENS,
) -> CalibratedDecoder:
    """A model with its calibration tokens, and costs that are measured already."""
    return CalibratedDecoder.at_hand(model, layers, TokenBatch(tokens, "test", 0), costs)


@torch.no_grad()
def divergence(original: PreTrainedModel, other: PreTrainedModel) -> float:
    """KL from the original to the other model on TOKENS, nats per token."""
    expected, found = (model(TOKENS).logits.double().log_softmax(-1) for model in (original, other))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()
