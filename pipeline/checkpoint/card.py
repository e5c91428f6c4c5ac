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

or with transformers alone, which runs `modeling_skipcat.py` from this folder:

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

`recipe.json` says how it was made, `plan.json` the rank of every group, `report.json` the error
of every group{error_time}. {fine_tuning}
Quality was not measured here: `skipcat validate` does.
"""


_TOTALS = (
    "dense_parameters",
    "kept_parameters",
    "total_before",
    "total_after",
    "factored",
    "kept_dense",
    "largest",
)


def model_card(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    """Fill the card from the recipe and the report."""
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
        error_time=" when it was compressed" if "recovery" in recipe else "",
        fine_tuning=_fine_tuning(recipe),
        **{name: totals[name] for name in _TOTALS},
    )


def _fine_tuning(recipe: dict[str, Any]) -> str:
    """What the card says of the training after the compression, or of its absence."""
    if "recovery" not in recipe:
        return "No fine-tuning took place."
    recovery = recipe["recovery"]
    settings, text, objective = recovery["settings"], recovery["text"], recovery["objective"]
    loss = recovery["loss"][objective]
    source = text["source"] if text["source"] != "self" else f"{settings['teacher']} itself"
    aims = {
        "next_token": "next-token cross entropy",
        "distillation": f"KL divergence from {settings['teacher']}",
    }
    earlier = "These were not the first: `recipe.json` has the earlier ones. "
    return (
        f"The factors were then fine-tuned with adapters of rank {settings['lora_rank']},\n"
        f"merged into them: {settings['steps']} steps of {settings['batch_size']} windows of "
        f"{text['window_length']} tokens from {source}, seed {text['seed']}.\n"
        f"{earlier if 'earlier' in recovery else ''}"
        f"On the {recovery['held_out_windows']} windows held out, the {aims[objective]},\n"
        f"in nats per token, was {loss['before']:.4f} before and {loss['after']:.4f} after."
    )
