"""Real stages over the tiny model, whole and broken."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from pipeline.errors import InputError
from pipeline.provenance import provenance
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import (
    VOCAB_SIZE,
    byte_tokenizer,
    shared_export,
    tiny_llama,
    write_record,
)
from validate.classifier import _Outputs as _ImageOutputs
from validate.decoder import DECODER, _Inputs, _Outputs
from validate.ledger import run_ledger
from validate.question import Question
from validate.record import Ledger
from validate.stages import Stage, Tolerance

CLOSE = Tolerance(min_cosine=0.99999)
ORIGINAL = Stage("original", lambda: TorchSession(tiny_llama()))


def onnx_stage(profile: str = "opset24", **fields: Any) -> Stage:
    """An export of the original."""
    name = f"onnx {profile}"
    return Stage(name, lambda: OnnxSession(shared_export(profile)), "original", CLOSE, **fields)


def unavailable_stage(*, required: bool) -> Stage:
    """A stage that says why it cannot run."""

    def refuse() -> Session:
        raise InputError("There is no GPU here.")

    return Stage("engine", refuse, "original", CLOSE, required=required)


def altered_torch(change: Callable[[torch.Tensor], object]) -> TorchSession:
    """The original with one weight changed."""
    model = tiny_llama()
    with torch.no_grad():
        change(model.model.layers[1].mlp.down_proj.weight)
    return TorchSession(model)


def perturb_onnx(folder: Path) -> None:
    """Add noise of a fifth of its spread to one matrix of an export, and record the new graph."""
    graph = onnx.load(folder / "model.onnx")
    matrices = [
        weight
        for weight in graph.graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT
        and len(weight.dims) == 2
        and VOCAB_SIZE not in weight.dims
    ]
    weight = max(matrices, key=lambda matrix: matrix.dims[0] * matrix.dims[1])
    values = numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, 0.2 * values.std(), values.shape)
    changed = numpy_helper.from_array((values + noise).astype(values.dtype), weight.name)
    weight.CopyFrom(changed)
    (folder / "model.onnx.data").unlink()
    onnx.save(graph, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def perturbed_export(folder: Path, profile: str) -> Path:
    """A copy of the shared export with one wrong matrix."""
    shutil.copytree(shared_export(profile), folder)
    perturb_onnx(folder)
    write_record(folder, profile)
    return folder


def run(*stages: Stage, **keywords: Any) -> Ledger:
    """A ledger over random tokens, small enough to take a second."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 48))
    batches = [tokens[:1, :32], tokens[1:, :16]]
    question = Question.of(byte_tokenizer(), frozenset(), tokens.shape[1], chat=False)
    inputs = _Inputs(batches, tokens, tokens[:2, :8], max_new_tokens=8, question=question)
    rows = run_ledger(stages, inputs, DECODER, **keywords)
    return Ledger(rows, inputs.describe(), provenance())


def outputs_alive() -> int:
    """How many stages' logits are held by anyone, of those that the collector knows."""
    gc.collect()
    # Not isinstance: it asks millions of objects for their class, and some of them think long.
    return sum(type(entry) in (_Outputs, _ImageOutputs) for entry in gc.get_objects())
