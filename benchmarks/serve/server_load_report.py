"""The figures of a run of server_load.py, and which of its claims do not hold."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.serve.server_load import Load

MEBIBYTE = 1 << 20
# Allocators take memory in steps, now and then long after the start: less than this is no leak. In
# runs of 1,000, 6,000 and 15,000 requests the largest was the same within 3 MiB.
ALLOWED_GROWTH = 0.02
ALLOWED_STATUS = {
    "not_json": 400,
    "no_messages": 400,
    "wrong_type": 400,
    "two_answers": 400,
    "unknown_field": 400,
    "unknown_model": 404,
    "prompt_too_long": 400,
    "body_too_long": 413,
    "wrong_content_type": 415,
    "unknown_route": 404,
    "wrong_method": 405,
    "not_http": 400,
}


def summary(
    load: Load, alone: dict[int, list[str]], kinds: list[str], seconds: float
) -> dict[str, Any]:
    """Figures of a run."""
    tally, wanted = load.tally, Counter(kinds)
    texts = {text for both in alone.values() for text in both}
    different = [answer for answer in tally.answers if answer.text not in alone[answer.prompt]]
    crossed = [answer for answer in different if answer.text in texts]
    bad = sum(wanted[kind] for kind in ALLOWED_STATUS)
    as_expected = sum(
        count for (kind, code), count in tally.refused.items() if code == ALLOWED_STATUS[kind]
    )
    firsts = sorted(answer.first_token_s for answer in tally.answers)
    return {
        "seconds": round(seconds, 2),
        "good": wanted["good"],
        "answered": len(tally.answers),
        "different_prompts": len(alone),
        "different_texts": len(texts),
        "turned_by_reuse": sum(first != second for first, second in alone.values()),
        "equal_to_alone": len(tally.answers) - len(different),
        "crossed": len(crossed),
        "first_differences": [
            {"prompt": load.prompts[a.prompt], "alone": alone[a.prompt][0], "load": a.text}
            for a in [*crossed, *different][:3]
        ],
        "bad": bad,
        "bad_with_their_4xx": as_expected,
        "statuses": {f"{kind} {code}": n for (kind, code), n in sorted(tally.refused.items())},
        "left_in_mid_stream": tally.left,
        "lost": tally.lost,
        "requests_per_s": round(len(kinds) / seconds, 1),
        "first_token_s": {
            "median": round(statistics.median(firsts), 4),
            "p95": round(firsts[int(0.95 * len(firsts))], 4),
        },
        "memory": memory_figures(tally.memory_bytes),
    }


def memory_figures(samples: list[int]) -> dict[str, Any]:
    """Resident memory over the run, by quarters; growth from the second to the last."""
    size = max(1, len(samples) // 4)
    quarters = [samples[i * size : (i + 1) * size] or samples[-1:] for i in range(4)]
    means = [statistics.fmean(quarter) for quarter in quarters]
    return {
        "samples": len(samples),
        "quarter_means_mib": [round(mean / MEBIBYTE, 2) for mean in means],
        "largest_mib": round(max(samples) / MEBIBYTE, 2),
        "growth": round(means[3] / means[1] - 1, 5),
    }


def weights_of(folder: Path | None) -> str:
    """`float`, or how many bits an export's weights have."""
    path = folder / "export.json" if folder else None
    if path is None or not path.is_file():
        return "float"
    weights: str = json.loads(path.read_text(encoding="utf-8")).get("weights", "float")
    return weights


def least_equal(record: dict[str, Any]) -> float:
    """The fraction of answers that must be those of the same prompt alone.

    All, but for low-bit weights: their products round their input, so that a near-tie between
    two tokens may turn with the rows that are decoded beside it.
    """
    return 1.0 if record["weights"] == "float" else 0.95


def failures(record: dict[str, Any]) -> list[str]:
    """What does not hold."""
    files, health = record["open_files"], record["health_after"]
    claims = {
        "none lost": not record["lost"] and record["answered"] == record["good"],
        "none crossed": record["crossed"] == 0,
        "as alone": record["equal_to_alone"] >= record["answered"] * least_equal(record),
        "every bad one a 4xx": record["bad_with_their_4xx"] == record["bad"],
        "no growth in memory": record["memory"]["growth"] <= ALLOWED_GROWTH,
        "no connection left": files["after"] <= files["before"],
        "no slot left": health["running"] == health["waiting"] == 0,
    }
    return [claim for claim, holds in claims.items() if not holds]
