"""The model card that a compressed checkpoint carries."""

from __future__ import annotations

from typing import Any

from pipeline.model.task import TASKS, TEXT

_TEMPLATE = """---
library_name: transformers
pipeline_tag: {task}
base_model_relation: quantized
tags: [low-rank, skipcat]
---

# {label}, {kept:.1%} of its {parameters} kept

Load it with skipcat installed:

```python
from pipeline.checkpoint.folder import load_checkpoint
model = load_checkpoint("this folder")
```

or with transformers alone, which runs `{code}` from this folder:

```python
{auto_class}.from_pretrained("this folder", trust_remote_code=True)
```

Without either, transformers fills the factored layers with random numbers and only warns.

| | |
| --- | --- |
| original model | {model} |
| method | {method}, effort {effort} |
| {linears} | {dense_parameters:,} before, {kept_parameters:,} after |
| all parameters | {total_before:,} before, {total_after:,} after |
| groups factored, kept dense | {factored}, {kept_dense} |
| largest entry of A' | {largest:.3f} |
| calibration | {calibration} |
| weights stored as | {dtype} |
{cache}
`recipe.json` says how it was made, `plan.json` the rank of every group, `report.json` the error
of every group{error_time}. {fine_tuning}
Quality was not measured here: `skipcat validate` does.
"""
_CACHE_ROW = """| KV cache | {token_bytes:,} bytes a token, of {dense_bytes:,} in float16 |
"""


def model_card(
    recipe: dict[str, Any], report: dict[str, Any], fine_tuning: str | None = None
) -> str:
    """Fill the card from the recipe and the report.

    Args:
        recipe: recipe.json of the checkpoint.
        report: its report.json.
        fine_tuning: sentences about a training after the compression; None if there was none.
    """
    settings, totals = recipe["settings"], report["totals"]
    task = recipe.get("task", TEXT)
    row = TASKS[task]
    return _TEMPLATE.format(
        task=task,
        auto_class=row.auto_class,
        parameters=row.card.parameters,
        linears=row.card.linears,
        calibration=row.card.calibration.format(
            **{"seed": settings["seed"]} | recipe["calibration"]
        ),
        label=recipe["label"],
        model=recipe["model"],
        kept=totals["kept_fraction"],
        method=recipe["method"]["summary"],
        effort=settings["effort"],
        dtype=recipe["dtype"],
        error_time=" when it was compressed" if fine_tuning else "",
        fine_tuning=fine_tuning or "No fine-tuning took place.",
        cache=_CACHE_ROW.format(**report["cache"]) if "cache" in report else "",
        code="modeling_cache.py" if "cache" in report else "modeling_skipcat.py",
        **totals,
    )
