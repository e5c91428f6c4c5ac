"""The steps of a training, and their state on disk, from which they go on to the same bits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artefact import damaged
from pipeline.errors import InputError, UsageError
from pipeline.kept_tensors import keep_tensors, kept_tensors
from pipeline.progress import track

# What AdamW keeps of a parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SECONDS_BETWEEN_SAVES = 60.0


def require_trainable(request: Any, least: Mapping[str, int]) -> None:
    """Refuse counts that are too small, and a learning rate that is none.

    Args:
        request: has them as attributes, `learning_rate` among them.
        least: smallest value of each count, by its name.

    Raises:
        UsageError: names the value and its range.
    """
    for name, smallest in least.items():
        if getattr(request, name) < smallest:
            raise UsageError(
                "A count is too small.",
                where="--" + name.replace("_", "-"),
                observed=getattr(request, name),
                expected=f"at least {smallest}",
            )
    if not (math.isfinite(request.learning_rate) and request.learning_rate > 0):
        raise UsageError(
            "The learning rate is out of range.",
            where="--learning-rate",
            observed=request.learning_rate,
            expected="a number above 0",
        )


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: steps finished.
        losses: training loss before each of them.
        learning_rates: first step (as text, for JSON) -> highest learning rate from there on.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)


class TrainingState:
    """Parameters and moments of a run in one file, replaced as a whole.

    Args:
        path: of the file; need not exist.
        parameters: those that are trained, by name.
        optimizer: an AdamW over them, in the same order.
        beside: tensors that steps change too, by name.
    """

    def __init__(
        self,
        path: Path,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.path, self.parameters, self.optimizer = path, parameters, optimizer
        self.beside = beside or {}

    def save(self, progress: Progress) -> None:
        """Write all that the next step depends on, aside and then renamed."""
        tensors = {f"value/{name}": value.detach() for name, value in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in moments.items()}
        tensors |= {f"beside/{name}": tensor.detach() for name, tensor in self.beside.items()}
        keep_tensors(self.path, tensors, {"progress": json.dumps(asdict(progress))})

    def load_(self) -> Progress:
        """Put parameters and moments where they were; the start of a run if there is no file.

        Raises:
            InputError: the file is broken, or of other parameters.
        """
        if not self.path.exists():
            return Progress()
        kept = kept_tensors(self.path)
        if kept is None:
            raise damaged(self.path, "not what was written")
        tensors, told = kept
        try:
            self._put_back(tensors)
        except (LookupError, RuntimeError) as error:
            raise damaged(self.path, "the state of another model") from error
        return Progress(**json.loads(told["progress"]))

    @torch.no_grad()
    def _put_back(self, tensors: dict[str, torch.Tensor]) -> None:
        moments = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            parameter.copy_(tensors[f"value/{name}"])
            if f"step/{name}" in tensors:
                moments[index] = {kind: tensors[f"{kind}/{name}"] for kind in _MOMENTS}
        for name, tensor in self.beside.items():
            tensor.copy_(tensors[f"beside/{name}"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def take_steps_(
    state: TrainingState,
    progress: Progress,
    steps: int,
    loss_at: Callable[[int], torch.Tensor],
    rate_at: Callable[[int], float],
    largest_gradient: float,
    what: str,
    clipped: Iterable[nn.Parameter] | None = None,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Take the steps that an earlier run has not taken yet, and keep the state now and then.

    Args:
        state: of parameters and optimizer, as it was loaded.
        progress: how far it is; advanced.
        steps: of the whole run.
        loss_at: the loss of a step, by its number from 0, a function of that and the parameters.
        rate_at: learning rate of a step; a group of the optimizer may multiply it by its `times`.
        largest_gradient: norm beyond which gradients are scaled down.
        what: is done, for whoever waits.
        clipped: the parameters in the order in which their norms are summed; None is the state's.
        after: what else a step changes, by its number.

    Raises:
        InputError: a loss or gradient that is not finite; the state on disk is from before it.
    """
    parameters = list(state.parameters.values() if clipped is None else clipped)
    saved = time.monotonic()
    for step in track(range(progress.step, steps), what):
        state.optimizer.zero_grad()
        loss = loss_at(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, largest_gradient)
        _require_finite(step, loss.item(), norm.item(), state.path)
        # Before the update and after its check: what is kept is known to have a finite loss.
        if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES:
            state.save(progress)
            saved = time.monotonic()
        for group in state.optimizer.param_groups:
            group["lr"] = rate_at(step) * group.get("times", 1.0)
        state.optimizer.step()
        after(step)
        progress.step = step + 1
        progress.losses.append(loss.item())


def _require_finite(step: int, loss: float, norm: float, path: Path) -> None:
    """Raise InputError for a step, counted from 0, whose loss or gradient is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = path.exists()
    raise InputError(
        "Training diverged.",
        where=f"step {step + 1}",
        observed=f"loss {loss}, gradient norm {norm}",
        expected="finite numbers",
        change="a smaller --learning-rate, "
        + ("with --resume from the last good state" if kept else "from the start"),
    )
