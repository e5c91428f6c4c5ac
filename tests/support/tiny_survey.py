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

from pipeline.compress.plan.layer_costs import Survey
from pipeline.model.structure import Layer, decoder_structure
from tests.support.families import tiny_model

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Surveyed:
    """A model with its structure and its survey; not to be written to."""

    model: PreTrainedModel
    layers: list[Layer]
    survey: Survey


@functools.cache
def surveyed(family: str) -> Surveyed:
    """The tiny model of a family, surveyed on TOKENS."""
    folder = Path(tempfile.mkdtemp(prefix="skipcat-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = tiny_model(family)
    layers = decoder_structure(model)
    survey = Survey(folder, {})
    survey.measure(model, layers, TOKENS, cat=True, seed=0)
    return Surveyed(model, layers, survey)


@torch.no_grad()
def divergence(original: PreTrainedModel, other: PreTrainedModel) -> float:
    """KL from the original to the other model on TOKENS, nats per token."""
    expected, found = (model(TOKENS).logits.double().log_softmax(-1) for model in (original, other))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()
