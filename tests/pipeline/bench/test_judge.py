from __future__ import annotations

from pipeline.bench.devices import DEVICES
from pipeline.bench.judge import judged_figures, verdicts
from pipeline.bench.published import FIGURES

# Groups in which what was asked for is missed: SmolLM2-360M at 7 W is 35% quicker than predicted.
MISSED = {"llama.cpp decode", "llama.cpp at 7 W"}


def test_figures_that_nothing_was_fitted_to_are_met_as_well_as_the_documentation_says() -> None:
    found = {one["group"]: one for one in verdicts(judged_figures()["published"])}
    assert {name for name, one in found.items() if one["met"] is False} == MISSED
    asked = [one for one in found.values() if one["asked"] is not None]
    assert all(one["inside_share"] >= 0.75 for one in asked)
    assert all(one["median_error"] <= one["asked"] for one in asked)
    assert found["llama.cpp decode"]["worst_error"] < 0.35


def test_every_published_figure_is_judged_once_and_belongs_to_one_group_at_least() -> None:
    published = judged_figures()["published"]
    assert len(published) == len(FIGURES)
    counted = {one["group"]: one["figures"] for one in verdicts(published)}
    modes = sum(counted.pop(name) for name in ("llama.cpp at 7 W", "llama.cpp at 25 W"))
    assert sum(counted.values()) == sum(not one.fitted for one in FIGURES)
    assert modes == 10


def test_devices_of_published_figures_are_known() -> None:
    names = {figure.device.partition("@")[0] for figure in FIGURES}
    assert names <= DEVICES.keys()
