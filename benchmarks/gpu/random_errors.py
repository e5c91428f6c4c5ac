"""What kernels are off by on random cases: counted, as a command, and as rows of a step."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import click
import torch

from benchmarks.gpu.steps import Row, Setting, outcome

BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
# (cases, seed) -> what `Errors.record` gives.
Measure = Callable[[int, int], dict[str, Any]]


@dataclass
class Errors:
    """Of so many random cases: the worst of each kind, and all that are beyond their bound."""

    cases: int
    seed: int
    worst: dict[str, float] = field(default_factory=dict)
    beyond: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, case: Any, kind: str, error: float, **more: Any) -> None:
        """One case: a dataclass with a `dtype`, which bounds it; `more` says how it was run."""
        kind = f"{str(case.dtype).removeprefix('torch.')}, {kind}"
        # `not <=` so that NaN counts.
        if not error <= BOUNDS[case.dtype]:
            described = replace(case, dtype=str(case.dtype))
            self.beyond.append({name: vars(described), **more, "error": error})
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)

    def record(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return vars(self)


def errors_command(what: str, measure: Callable[[str], Measure]) -> click.Command:
    """A command that prints errors as JSON; exit status 1 when one is beyond its bound.

    Args:
        what: `layers`, say.
        measure: of a device, `cuda` or `cpu`.
    """

    @click.command(help=f"Print the errors of random {what} as JSON; exit status 1 beyond a bound.")
    @click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
    @click.option("--cases", type=click.IntRange(min=1), default=100, show_default=True)
    @click.option("--seed", type=int, help="By default a fresh one.")
    def command(device: str, cases: int, seed: int | None) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise click.ClickException("PyTorch sees no GPU; --device cpu needs none")
        found = measure(device)(cases, secrets.randbelow(1 << 31) if seed is None else seed)
        click.echo(json.dumps(found, indent=1))
        sys.exit(1 if found["beyond"] else 0)

    return command


def error_rows(
    what: str, measure: Measure, batches: int, cases: int, setting: Setting, enough_s: float
) -> Iterator[Row]:
    """Batches of random cases, while there is time for one more."""
    for place in range(batches):
        name = f"batch {place} of {cases} {what}"
        if name in setting.done or setting.left_s < enough_s:
            continue
        found = measure(cases, setting.seed + place)
        claim = "within 1e-3 in fp16, 1e-2 in bf16"
        yield name, {**found, "verdicts": [outcome(claim, not found["beyond"])]}
