"""Every decoder family through compress and export, against transformers: docs/families.md.

A run renews their rows in benchmarks/results/families.json, of which `make docs` makes the table.
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
    """What was found of each family; rows of those that are not run stay as they are."""
    path, found = RESULTS / "families.json", {}
    if path.exists():
        found = {row["family"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    yield found
    record = {
        "tokens": _IDS.shape[1],
        "window": WINDOW,
        "original_context": CONTEXT,
        "tolerance": _TOLERANCE,
        "rows": [found[name] for name in FAMILIES if name in found],
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_transformers_past_window_and_context_or_is_refused_with_the_reason(
    name: str, rows: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    features, model_type, _ = FAMILIES[name]
    row: dict[str, Any] = {"family": name, "model_type": model_type, "features": features}
    row["transformers"] = transformers.__version__
    source, small = save_model(tmp_path / "model", name), tmp_path / "small"
    row["compress"] = _outcome(lambda: _compressed(source, small))
    source = small if small.exists() else source
    expected = functools.cache(lambda read: expected_logits(source, _IDS[:, :read]))
    for profile in PROFILES:
        measure = functools.partial(_error, source, tmp_path / profile, profile, expected)
        row[profile] = _outcome(measure)
    rows[name] = row
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
        str(source), 0.7, windows=20, window_length=CONTEXT, dtype="float32", effort="fast"
    )
    return {"kept_fraction": compress_to_folder(request, folder)["totals"]["kept_fraction"]}


def _error(
    source: Path, folder: Path, profile: str, expected: Callable[[int], np.ndarray]
) -> dict[str, float]:
    """The largest difference of a logit, of the largest logit."""
    session = exported(source, folder, profile)
    # An export may be bounded, to a context beyond which the model is another.
    read = min(session.max_length, _IDS.shape[1])
    logits = expected(read)
    pieces = [[cut for cut in cuts if cut < read] for cuts in _CUTS]
    found = [in_pieces(session, _IDS[:, :read], cuts) for cuts in pieces]
    error = float(max(abs(f - logits).max() for f in found) / abs(logits).max())
    return {"error": error, "tokens": read}
