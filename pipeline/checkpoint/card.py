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


_ROUNDED_TEMPLATE = """---
library_name: transformers
base_model_relation: quantized
tags: [int{bits}, skipcat]
---

# {label}, convolutions in {bits} bits for {runtime}

Load it with skipcat installed:

```python
from pipeline.checkpoint.folder import load_checkpoint
model = load_checkpoint("this folder")
```

| | |
| --- | --- |
| original model | {model} |
| method | {method} |
| convolutions in {bits} bits | {rounded} of {convolutions} |
| activations | {activation_bits} bits, as {runtime} takes them |
| stay in float32 | {kept} |
| weights | {stored_bytes:,} bytes; {float32_bytes:,} in float32 |
| error of the outputs, in parts of their variance | {loss:.3g} on the calibration images |
| calibration | {calibration} |

`recipe.json` says how it was made, `report.json` what became of every convolution.
{training}

Export it with `--profile {profile}` and `--dtype float32`; another runtime's is refused. Scores
were not measured here: `skipcat validate` does.
"""
_PROFILE_OF = {"cpu": "cpu", "tensorrt": "opset24"}
_LOSSES = {
    "output_error": "error of the outputs, in parts of the teacher's variance,",
    "label_loss": "loss of the labels",
}


def rounded_card(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    """The card of a network of rounded convolutions, trained under rounding or not.

    Args:
        recipe: recipe.json of the checkpoint.
        report: its report.json.
    """
    totals, convolutions = report["totals"], report["convolutions"]
    kept = [name for name, one in convolutions.items() if not one["rounded"]]
    kept += report["left_out"]
    calibration = TASKS[recipe["task"]].card.calibration
    return _ROUNDED_TEMPLATE.format(
        label=recipe["label"],
        model=recipe["model"],
        bits=report["bits"]["kernels"],
        activation_bits=report["bits"]["activations"],
        runtime=report["runtime"],
        profile=_PROFILE_OF[report["runtime"]],
        method=recipe["method"]["summary"],
        rounded=totals["rounded"],
        convolutions=len(convolutions) + len(report["left_out"]),
        kept=", ".join(kept) or "none of them",
        stored_bytes=totals["stored_bytes"],
        float32_bytes=totals["float32_bytes"],
        loss=report["loss"],
        calibration=calibration.format(
            **{"seed": recipe["settings"]["seed"]} | recipe["calibration"]
        ),
        training=_trained_under_rounding(recipe.get("recovery")),
    )


def _trained_under_rounding(recovery: dict[str, Any] | None) -> str:
    """What a card says of training under rounding."""
    if recovery is None:
        return "It was not trained under rounding."
    settings = recovery["settings"]
    ((name, loss),) = recovery["loss"].items()
    return (
        f"It was then trained under rounding: {settings['steps']} steps of "
        f"{settings['batch_size']} images of {recovery['images']['source']}, by "
        f"{recovery['objective']}.\nOn {recovery['held_out_windows']} images held out, the "
        f"{_LOSSES[name]} was {loss['before']:.4g} before and {loss['after']:.4g} after."
    )


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
