"""The model card that a compressed image classifier carries."""

from __future__ import annotations

from typing import Any

from pipeline.compress.methods import METHODS

TEMPLATE = """---
library_name: transformers
pipeline_tag: image-classification
base_model_relation: quantized
tags: [low-rank, skipcat]
---

# {label}, {kept_fraction:.1%} of its encoder's linear parameters kept

Load it with skipcat installed:

```python
from pipeline.checkpoint.folder import load_checkpoint
model = load_checkpoint("this folder")
```

or with transformers alone, which runs `modeling_skipcat.py` from this folder:

```python
AutoModelForImageClassification.from_pretrained("this folder", trust_remote_code=True)
```

Without either, transformers fills the factored layers with random numbers and only warns.

| | |
| --- | --- |
| original model | {model} |
| method | {method}, effort {effort} |
| linear parameters of the encoder | {dense_parameters:,} before, {kept_parameters:,} after |
| all parameters | {total_before:,} before, {total_after:,} after |
| groups factored, kept dense | {factored}, {kept_dense} |
| largest entry of A' | {largest:.3f} |
| calibration | {images} images of {source}, seed {seed}; no labels were used |
| weights stored as | {dtype} |

`recipe.json` says how it was made, `plan.json` the rank of every group, `report.json` the error
of every group. No fine-tuning took place. Quality was not measured here: `skipcat validate` does.
"""


def image_card(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    """Fill the card from the recipe and the report."""
    settings, images = recipe["settings"], recipe["calibration"]
    return TEMPLATE.format(
        label=recipe["label"],
        model=recipe["model"],
        method=METHODS[settings["method"]].summary,
        effort=settings["effort"],
        images=images["images"],
        source=images["source"],
        seed=settings["seed"],
        dtype=recipe["dtype"],
        **report["totals"],
    )
