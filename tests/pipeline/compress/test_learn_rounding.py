"""Learned rounding: layers return more of what they should, and the model is nearer to its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import training_state
from pipeline.artefact import sha256_of_file
from pipeline.compress.methods import Fit
from pipeline.compress.plan.plan import GroupPlan, RankPlan, uniform_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.compress.walk import compress_
from pipeline.errors import UsageError
from pipeline.training_state import TrainingState
from tests.support.families import save_family
from tests.support.tiny_survey import calibrated, divergence, surveyed

TOKENS = torch.randint(0, 256, (128, 24), generator=torch.Generator().manual_seed(5))


def in_format(group: GroupPlan, format: str) -> GroupPlan:
    down = None if group.form == "dense" else format
    return replace(group, up_format=format, down_format=down, reason=None)


def rounded(
    family: str, steps: int, format: str, kept: float, two_sided: bool
) -> tuple[float, list[dict[str, Any]]]:
    """A tiny model in a low-bit format: its KL to the original, and the reports of its groups."""
    tiny = surveyed(family)
    model = copy.deepcopy(tiny.model)
    plan = uniform_plan(tiny.layers, kept)
    groups = {
        name: tuple(in_format(group, format) for group in planned)
        for name, planned in plan.layers.items()
    }
    done = compress_(
        calibrated(model, tiny.layers, tiny.survey, TOKENS),
        RankPlan(groups, {}),
        dtype=torch.float32,
        fit=Fit(two_sided, mix=0.5, learned_steps=steps),
    )
    return divergence(tiny.model, model), done.groups


@pytest.mark.parametrize(
    ("family", "format", "kept", "two_sided"),
    [
        ("llama", "int3-b16-asym", 1.0, False),
        ("qwen3", "int4-b16-sym", 0.8, True),
        ("gemma3_text", "int4-b16-offset", 1.0, True),
    ],
)
def test_layers_return_more_of_what_they_should(
    family: str, format: str, kept: float, two_sided: bool
) -> None:
    before, _ = rounded(family, 0, format, kept, two_sided)
    after, reports = rounded(family, 80, format, kept, two_sided)
    for report in reports:
        assert report["layer_error_learned"] <= report["layer_error_rounded"]
    # By how much depends on the processor: what is rounded differs with the order of sums.
    assert reports[0]["layer_error_learned"] < 0.999 * reports[0]["layer_error_rounded"]
    # Layers are what is learned; the KL of a tiny model follows them, but for its noise.
    assert after < 1.02 * before


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model beside a calibration text."""
    folder = save_family(tmp_path_factory.mktemp("source") / "model", "llama")
    (folder.parent / "text.txt").write_text("Whales sing, and people listen to them. " * 200)
    return folder


def compress(source: Path, output: Path, resume: bool = False) -> str:
    """The hash of the weights of a model in 3 bits whose rounding is learned."""
    request = CompressRequest(
        str(source), 1.0, method="gptq", weights="int3-b16-asym", runtime="any", effort="fast",
        calibration=str(source.parent / "text.txt"), windows=16, window_length=32,
        learn_rounding=True,
    )  # fmt: skip
    compress_to_folder(request, output, resume=resume)
    return sha256_of_file(output / "model.safetensors")


@pytest.mark.parametrize("saves", [5, 25, 40])
def test_a_run_that_is_interrupted_while_it_learns_goes_on_to_the_same_bytes(
    saves: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = compress(source, tmp_path / "undisturbed")
    whole, calls = TrainingState.save, []

    def stop(state: TrainingState, progress: training_state.Progress) -> None:
        whole(state, progress)
        calls.append(state)
        if len(calls) == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training_state, "_SECONDS_BETWEEN_SAVES", 0.0)
        patched.setattr(TrainingState, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert compress(source, tmp_path / "made", resume=True) == undisturbed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Nothing is rounded"),
        ({"weights": "int8-b64-sym", "effort": "fast"}, "feeds a layer"),
        ({"weights": "int8-b64-sym", "one_shot": True}, "feeds a layer"),
    ],
)
def test_what_leaves_nothing_to_learn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompressRequest("x", learn_rounding=True, **changes).check()
