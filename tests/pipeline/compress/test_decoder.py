"""A decoder's calibration text: what the survey has read of it is not read again by a fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.methods import Fit
from pipeline.compress.one_shot import OneShotStream
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.model.structure import decoder_structure
from tests.support.families import tiny_model
from tests.support.tiny_survey import TOKENS


def surveyed_on(count: int, folder: Path, *, inputs: bool = True) -> CalibratedDecoder:
    """A tiny Llama whose survey has read so many of the windows."""
    model = tiny_model("llama")
    layers, batch = decoder_structure(model), TokenBatch(TOKENS, "test", 0)
    costs = LayerCosts(folder, {})
    costs.measure(model, layers, batch.spread(count), CostRequest(inputs=inputs))
    return CalibratedDecoder.at_hand(model, layers, batch, costs, surveyed=count)


@pytest.mark.parametrize("count", [3, 8, len(TOKENS)])
def test_moments_are_of_all_text_though_a_fit_reads_what_the_survey_did_not(
    count: int, tmp_path: Path
) -> None:
    ready = surveyed_on(count, tmp_path)
    stream = ready.stream(Fit())
    assert isinstance(stream, OneShotStream)
    read = 0 if stream.stream is None else stream.stream.tokens // TOKENS.shape[1]
    assert read == len(TOKENS) - count
    whole = LayerStream(ready.model, ready.layers, TOKENS)
    for index, layer in enumerate(ready.layers):
        expected = whole.advance(index)
        stream.enter(index)
        for group in layer.groups:
            wanted, (found, drift) = expected[group.name].mean(), stream.measure(index, group.name)
            assert drift is None
            assert found.dtype == torch.float32
            # The survey goes back from hidden states that were rounded to bfloat16.
            assert float((found - wanted).norm() / wanted.norm()) < 0.01
        stream.leave(index)


def test_a_survey_that_kept_no_inputs_leaves_all_text_to_the_fit(tmp_path: Path) -> None:
    ready = surveyed_on(8, tmp_path, inputs=False)
    stream = ready.stream(Fit())
    assert isinstance(stream, OneShotStream)
    assert stream.stream is not None
    assert torch.equal(torch.cat(stream.stream._stream.batches), TOKENS)


def test_a_finished_layer_is_gone_through_where_there_is_text_left(tmp_path: Path) -> None:
    for count in (8, len(TOKENS)):
        stream = surveyed_on(count, tmp_path / str(count)).stream(Fit())
        stream.enter(0, measure=False)
        stream.leave(0)
        stream.enter(1)
        found, _ = stream.measure(1, surveyed_group(stream))
        assert torch.isfinite(found).all()


def surveyed_group(stream: object) -> str:
    assert isinstance(stream, OneShotStream)
    return stream.layers[1].groups[0].name


def test_windows_are_the_surveys_or_the_rest() -> None:
    batch = TokenBatch(TOKENS, "test", 0)
    for count in (0, 5, len(TOKENS)):
        both = torch.cat([batch.spread(count), batch.rest_of(count)])
        assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, TOKENS.tolist()))
