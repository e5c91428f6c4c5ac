"""What may import what: the floors of the house, read off every import statement there is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.model.task import TASKS

ROOT = Path(__file__).parents[1]
# From the ground up: a package imports its own floor and those before it.
FLOORS = (
    "ground",  # files of pipeline/ itself that stand alone
    "workers",
    "quantize",
    "model",
    "driving",  # of one task: its network and its data
    "calibrate",
    "checkpoint",
    "int8",
    "export",
    "compress",  # what a file of a runtime holds is said by export's contract
    "kernels",
    "engine",
    "runtime",
    "recover",
    "serve",
    "validate",
    "bench",
    "bundle",
    "build",  # doctor, build, face
    "cli",
)
ABOVE = {"build": "build", "doctor": "build", "face": "build", "substitute": "build"}
# Adapters of a task, and what they alone may ask: everything else goes through TASKS.
OF_ONE_TASK = (
    "pipeline.compress.classifier",
    "pipeline.compress.decoder",
    "pipeline.compress.driving",
    "pipeline.compress.estimate",
    "pipeline.compress.timed_layer",
    "pipeline.export.prove_decoder",
    "pipeline.export.prove_images",
    "pipeline.export.trace_classifier",
    "pipeline.export.trace_decoder",
    "pipeline.export.trace_driving",
    "pipeline.model.classifier_structure",
    "pipeline.calibrate.driving_images",
    "pipeline.calibrate.driving_labels",
    "pipeline.calibrate.images",
    "pipeline.runtime.driving",
    "pipeline.runtime.sessions.driving_sessions",
    "pipeline.runtime.sessions.image_sessions",
    "validate.classifier",
    "validate.decoder",
    "validate.driving",
)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the product, by its dotted name."""
    found = {}
    for package in ("pipeline", "validate"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports_of(name: str) -> Iterator[str]:
    """Modules of the product that a module imports, wherever in it the statement stands."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """Who imports whom, within the product."""
    return frozenset(
        (name, target) for name in modules() for target in imports_of(name) if target in modules()
    )


def floor_of(name: str) -> str:
    package, _, rest = name.partition(".")
    if package == "validate":
        return "validate"
    first = rest.partition(".")[0]
    return ABOVE.get(first, first if first in FLOORS else "ground")


def test_every_package_stands_on_a_floor() -> None:
    packages = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert packages <= set(FLOORS)


def test_nothing_imports_a_higher_floor() -> None:
    upwards = [
        f"{name} -> {target}"
        for name, target in sorted(arrows())
        # The face is lazy: what `import pipeline` offers stands above everything.
        if name != "pipeline" and FLOORS.index(floor_of(target)) > FLOORS.index(floor_of(name))
    ]
    assert upwards == []


def test_there_are_no_circles() -> None:
    targets: dict[str, set[str]] = {name: set() for name in modules()}
    for name, target in arrows():
        if name != "pipeline" and name != target:
            targets[name].add(target)
    while True:
        free = {name for name, others in targets.items() if not others & targets.keys()}
        if not free:
            break
        targets = {name: others for name, others in targets.items() if name not in free}
    assert targets == {}


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("pipeline.export", "pipeline.compress"),
        ("pipeline.runtime", "pipeline.compress"),
        ("pipeline.kernels", "pipeline.compress"),
        ("pipeline.recover", "pipeline.compress"),
        ("pipeline.engine", "pipeline.runtime"),
        ("pipeline.quantize", "pipeline.model"),
        ("pipeline.quantize", "pipeline.artefact"),
        ("pipeline.compress.factorize", "pipeline.model"),
        ("pipeline.compress.factorize", "pipeline.artefact"),
        ("pipeline.compress.factorize", "transformers"),
        ("pipeline.quantize", "transformers"),
        ("pipeline.int8", "pipeline.model"),
        ("pipeline.int8", "pipeline.driving"),
    ],
)
def test_a_stage_does_not_know_what_it_must_not(package: str, never: str) -> None:
    inside = [name for name in modules() if name == package or name.startswith(package + ".")]
    assert inside
    for name in inside:
        for target in imports_of(name):
            assert target != never, name
            assert not target.startswith(never + "."), name


def test_an_adapter_is_imported_by_the_table_alone_or_by_adapters_of_its_task() -> None:
    named = {
        reference.partition(":")[0] for row in TASKS.values() for reference in row.adapters.values()
    }
    assert named - {"pipeline.engine.profiles"} <= set(OF_ONE_TASK)
    words = {"driving": "driving", "class": "images", "image": "images"}
    task_of = {
        name: next((task for word, task in words.items() if word in name), "text")
        for name in OF_ONE_TASK
    }
    for name, target in arrows():
        if target in task_of:
            assert task_of.get(name) == task_of[target], f"{name} -> {target}"


def test_tasks_are_compared_in_no_module_but_the_table_and_adapters() -> None:
    allowed = {"pipeline.model.task", *OF_ONE_TASK}
    for name, tree in modules().items():
        if name in allowed:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                words = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                assert not words & {"IMAGES", "TEXT", "DRIVING"}, f"{name}:{node.lineno}"
