"""How the network is trained, as data: stages with their sets, augmentation, steps and rates.

Q-YOLOP trains in four stages (2307.04537): with mosaic on a large set, without it on the same, on
that and a second set of another place, and last with the numbers quantised. The first three are
here; the last is the same network at a smaller size, and so a recovery, not a training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.driving.augment import Amounts, Augmentation
from pipeline.errors import UsageError
from pipeline.training_state import require_trainable

FIRST, SECOND = "first", "second"
_WARMUP = 0.05
_LAST_RATE = 0.02  # of the highest


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        name: as the user gives it.
        sets: what it reads, of FIRST and SECOND, equally often.
        augmentation: what chance does to a sample.
        share: of the steps of all stages.
        rate: highest learning rate, times the user's.
    """

    name: str
    sets: tuple[str, ...]
    augmentation: Augmentation
    share: float
    rate: float

    def rate_at(self, step: int, steps: int) -> float:
        """Part of the highest rate at a step of so many: a warm-up, then half a cosine."""
        warmup = max(1, round(steps * _WARMUP))
        if step < warmup:
            return self.rate * (step + 1) / warmup
        passed = (step - warmup) / max(1, steps - warmup)
        falling = 0.5 * (1 + math.cos(math.pi * passed))
        return self.rate * (_LAST_RATE + (1 - _LAST_RATE) * falling)


_LITTLE = Augmentation(0.0, Amounts(3, 0.05, 0.1, 1), 0.0, 0.2)
STAGES = (
    Stage("pretrain", (FIRST,), Augmentation(0.5, Amounts(), 0.0, 0.3), 3 / 9, 1.0),
    Stage("finetune", (FIRST,), _LITTLE, 1 / 9, 0.4),
    Stage("mix", (FIRST, SECOND), _LITTLE, 5 / 9, 0.4),
)
ALL = "all"


@dataclass(frozen=True)
class TrainRequest:
    """What to train, on what, and for how long.

    Attributes:
        stage: one of STAGES, or ALL, in their order.
        data: the first set, as `pipeline.driving.data.open_data` takes it.
        second_data: the second, which the stage `mix` adds.
        model: a folder to begin with; None begins with random weights.
        steps: of the optimizer, of all stages together.
        batch_size: images in each step.
        learning_rate: the highest, of the first stage.
        size: height and width of the network's input; that of `model` where it is given.
        width: channels of its first convolution; likewise.
        scored: images of each set's validation part to score every stage on.
        seed: of weights, order and augmentation.
        bfloat16: multiply in bfloat16 where torch's autocast does.
        device: of torch.
    """

    stage: str = ALL
    data: str = "scenes:wide:2000"
    second_data: str = "scenes:dense:600"
    model: Path | None = None
    steps: int = 3600
    batch_size: int = 8
    learning_rate: float = 3e-3
    size: tuple[int, int] = (192, 320)
    width: int = 16
    scored: int = 160
    seed: int = 0
    bfloat16: bool = False
    device: str = "cpu"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that are asked for."""
        return tuple(stage for stage in STAGES if self.stage in (ALL, stage.name))

    def steps_of(self, stage: Stage) -> int:
        """How many steps a stage has, at least one."""
        whole = sum(other.share for other in self.stages)
        return max(1, round(self.steps * stage.share / whole))

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: says what.
        """
        if not self.stages:
            known = ", ".join(stage.name for stage in STAGES)
            raise UsageError("There is no such stage.", observed=self.stage, expected=known)
        require_trainable(self, {"steps": 1, "batch_size": 1, "scored": 1})
        if self.stage in ("finetune", "mix") and self.model is None:
            raise UsageError(
                "This stage goes on with a trained network.",
                where=f"--stage {self.stage}",
                change="pass --model FOLDER, or --stage all",
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                "torch cannot use this device.", where="--device", observed=self.device
            ) from error


def places_at(seed: int, step: int, batch_size: int, counts: list[int]) -> list[tuple[int, int]]:
    """What a step reads: number of a set and place in it, a function of seed and step alone.

    Sets take turns; all places of one are read once before any is read again.

    Args:
        seed: of the order.
        step: counted from 0.
        batch_size: images.
        counts: of images in each set.
    """
    found = []
    for number in range(step * batch_size, (step + 1) * batch_size):
        turn, which = divmod(number, len(counts))
        epoch, place = divmod(turn, counts[which])
        order = np.random.default_rng([seed, which, epoch]).permutation(counts[which])
        found.append((which, int(order[place])))
    return found
