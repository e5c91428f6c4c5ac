"""Every decoder family through compress and export, against transformers: docs/families.md.

A whole run writes benchmarks/results/families.json, of which `make docs` makes the table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from benchmarks import RESULTS
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError
from pipeline.export.contract import PROFILES
from tests.support.model_families import (
    CONTEXT,
    FAMILIES,
    WINDOW,
    expected_logits,
    exported,
    in_pieces,
    save_model,
)

pytestmark = pytest.mark.slow
_TOLERANCE = 1e-4
# Beyond two windows and the original context of a scaled rotary embedding, in the prompt and behind
# it: at once, token by token, and several tokens behind a cache.
_IDS = np.random.default_rng(0).integers(3, 250, size=(1, 2 * max(WINDOW, CONTEXT) + 5))
_CUTS: list[list[int]] = [[], list(range(3, _IDS.shape[1])), [11, 13, 14, 30]]
# A family that is known to work must not come to be refused unseen.
_MUST_WORK = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "stablelm",
    "olmo", "olmo2", "olmo3", "starcoder2", "cohere", "glm", "granite", "smollm3", "ernie4_5",
    "exaone4",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, dict[str, Any]]]:
    """What was found of each family; written where all of them were run."""
    found: dict[str, dict[str, Any]] = {}
    yield found
    if found.keys() == FAMILIES.keys():
        record = {
            "tokens": _IDS.shape[1],
            "window": WINDOW,
            "original_context": CONTEXT,
            "tolerance": _TOLERANCE,
            "transformers": transformers.__version__,
            "rows": [found[name] for name in FAMILIES],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (RESULTS / "families.json").write_text(text, "utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_transformers_past_window_and_context_or_is_refused_with_the_reason(
    name: str, rows: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    row = rows[name] = {"family": name, "model_type": FAMILIES[name][1]}
    row |= {"features": FAMILIES[name][0]}
    source, small = save_model(tmp_path / "model", name), tmp_path / "small"
    row["compress"] = _outcome(lambda: _compressed(source, small))
    source = small if small.exists() else source
    expected = functools.cache(lambda: expected_logits(source, _IDS))
    for profile in PROFILES:
        measure = functools.partial(_error, source, tmp_path / profile, profile, expected)
        row[profile] = _outcome(measure)
    ends = {stage: row[stage] for stage in ("compress", *PROFILES)}
    wrong = {s: e for s, e in ends.items() if e.get("error", 0.0) > _TOLERANCE}
    assert not wrong
    assert name not in _MUST_WORK or not any("refused" in end for end in ends.values()), ends


def _outcome(action: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What an action finds, or the reason for which it is refused; anything else is a fault."""
    try:
        return action()
    except InputError as error:
        # Of where it happened, only what holds on another machine.
        told = [error.what, error.details.get("observed", "")]
        return {"refused": " ".join(filter(None, told))}


def _compressed(source: Path, folder: Path) -> dict[str, float]:
    request = CompressRequest(
        str(source), 0.7, windows=6, window_length=CONTEXT, dtype="float32", effort="fast"
    )
    return {"kept_fraction": compress_to_folder(request, folder)["totals"]["kept_fraction"]}


def _error(
    source: Path, folder: Path, profile: str, expected: Callable[[], np.ndarray]
) -> dict[str, float]:
    """The largest difference of a logit, of the largest logit."""
    session, logits = exported(source, folder, profile), expected()
    found = [in_pieces(session, _IDS, cuts) for cuts in _CUTS]
    return {"error": float(max(abs(f - logits).max() for f in found) / abs(logits).max())}
