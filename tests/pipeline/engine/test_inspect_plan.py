from __future__ import annotations

import json

from pipeline.engine.inspect_plan import _inspected_types


def test_inspector_output_is_counted_by_type_with_or_without_details() -> None:
    text = json.dumps({"Layers": [{"LayerType": "gemm"}, {"LayerType": "gemm"}, "a name"]})
    assert _inspected_types(text) == {"gemm": 2, "unnamed": 1}
