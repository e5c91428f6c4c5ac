"""What a recovery is asked to do, in which steps, and what is refused before weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.calibrate.text import require_text
from pipeline.checkpoint.folder import DTYPES, read_record, require_checkpoint
from pipeline.errors import InputError, UsageError
from pipeline.json_file import json_field, read_json_object
from pipeline.model.load import refuse_long_windows
from pipeline.model.loading import explaining
from pipeline.model.task import require_decoder
from pipeline.model.tokenizer_file import following_tokenizer
from pipeline.recover.adapters import require_peft
from pipeline.training_state import require_trainable

_WARMUP_FRACTION = 0.1
_HELD_OUT_PART = 10


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        steps: how many.
        batch_size: windows that each reads.
        learning_rate: the highest.
        seed: of the order in which windows are read.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate of a step counted from 0: a linear warm-up, then half a cosine to 0."""
        warmup = max(1, round(self.steps * _WARMUP_FRACTION))
        if step < warmup:
            return self.learning_rate * ((step + 1) / warmup)
        passed = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * passed))

    def windows_at(self, step: int, count: int) -> np.ndarray:
        """Indices of the windows that a step reads.

        All are read once before any is read again, in another order each time. Where the batch
        size does not divide their number, the few left over sit out this time.

        Args:
            step: counted from 0.
            count: windows there are, at least `batch_size`.

        Returns:
            int64 [batch_size], in [0, count).
        """
        epoch, place = divmod(step, count // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class RecoverRequest:
    """What to fine-tune, on what, and for how long.

    Attributes:
        checkpoint: a compressed checkpoint's folder.
        text: a text file, `wikitext2+c4`, or `self`: sampled from the teacher; of rounded
            convolutions images without labels. Empty where `data` is given.
        teacher: model whose distribution is the target; None for the text's own next tokens.
        data: of rounded convolutions, labelled images, as `skipcat train` takes them.
        steps: of the optimizer.
        lora_rank: of the adapter of each factor.
        lora_alpha: an adapter adds alpha / rank times its product.
        learning_rate: the highest, after the warm-up.
        batch_size: windows in each step.
        windows: taken from the text, a tenth of them held out; None for as many as the steps can
            read once.
        window_length: tokens in each.
        seed: of the windows, their order and the adapters.
        bfloat16: multiply in bfloat16 where torch's autocast does; weights stay float32.
        device: of torch, where the steps are taken.
        trust_remote_code: let the teacher's own code run.
    """

    checkpoint: Path
    text: str
    steps: int
    teacher: str | None = None
    data: str | None = None
    lora_rank: int = 8
    lora_alpha: int = 16
    learning_rate: float = 1e-4
    batch_size: int = 4
    windows: int | None = None
    window_length: int = 512
    seed: int = 0
    bfloat16: bool = False
    device: str = "cpu"
    trust_remote_code: bool = False

    def inputs_of(self, output: Path) -> tuple[object, ...]:
        """What is read and may not be lost to the output; the checkpoint itself may be replaced."""
        replaced = self.checkpoint.resolve() == output.resolve()
        labelled = (self.data or "").partition(":")[0]
        return (() if replaced else (self.checkpoint,)) + (self.text, self.teacher or "", labelled)

    @property
    def window_count(self) -> int:
        """Windows to take from the text, held-out ones included."""
        return self.windows or _windows_needed(self.steps, self.batch_size)

    @property
    def schedule(self) -> Schedule:
        """The steps to take."""
        return Schedule(self.steps, self.batch_size, self.learning_rate, self.seed)

    def check(self) -> None:
        """Refuse values that cannot be meant, before any file is opened.

        Raises:
            UsageError: names the value and its range.
        """
        least = {"steps": 1, "lora_rank": 1, "lora_alpha": 1, "batch_size": 1, "window_length": 2}
        if self.windows is not None:
            least["windows"] = _windows_needed(1, max(1, self.batch_size))
        require_trainable(self, least)
        if bool(self.text) == bool(self.data):
            raise UsageError(
                "There is one thing to train on.",
                where="--text, --data",
                observed="both" if self.text else "neither",
                expected="--text; or for rounded convolutions --data, images with labels",
            )
        if self.text == "self" and self.teacher is None:
            # The expected gradient of the cross entropy of a model's own samples is zero.
            raise UsageError(
                "A model learns nothing from text that it sampled itself.",
                where="--text self",
                expected="text sampled from the original model",
                change="pass --teacher MODEL, or a text file",
            )
        _require_device(self.device)


def held_out(windows: int) -> int:
    """How many of the windows are kept for measuring: a tenth, at least one."""
    return max(1, windows // _HELD_OUT_PART)


def _windows_needed(steps: int, batch_size: int) -> int:
    """Fewest windows, held-out ones included, that let each step read new ones."""
    # n - held_out(n) is at least 9 n / 10, and n - 1 where n is below 10.
    return -(-steps * batch_size * _HELD_OUT_PART // (_HELD_OUT_PART - 1))


def _require_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "torch cannot use this device.",
            where="--device",
            observed=f"{name}: {str(error).splitlines()[0]}",
            change="pass --device cpu, or another that torch knows here",
        ) from error


@dataclass(frozen=True)
class Recoverable:
    """A checkpoint that can be recovered, without its weights.

    Attributes:
        modules: its factored modules, as in `quantization_config.modules`.
        recipe: recipe.json.
        report: report.json.
        tokenizer: its tokenizer.
        dtype: that its weights are stored in.
        vocabulary_size: logits that it gives.
    """

    modules: dict[str, dict[str, Any]]
    recipe: dict[str, Any]
    report: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    vocabulary_size: int

    @classmethod
    def read(cls, request: RecoverRequest) -> Recoverable:
        """Read all of a checkpoint but its weights, and refuse what would fail later.

        Raises:
            InputError: not a compressed decoder, its records are missing, or too little text.
            MissingPackageError: peft is not installed.
            UsageError: windows longer than the model's context.
        """
        require_peft()
        folder = request.checkpoint
        require_checkpoint(folder)
        require_decoder(folder)
        modules = _factored_modules(folder)
        recipe, report = read_record(folder, "recipe.json"), read_record(folder, "report.json")
        for name, record in (("recipe.json", recipe), ("report.json", report)):
            if not record:
                raise InputError(
                    "A record of the checkpoint is missing.",
                    where=folder / name,
                    change="copy the whole folder that skipcat compress wrote",
                )
        code = request.trust_remote_code
        with explaining("The checkpoint's config or tokenizer could not be loaded.", folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
            tokenizer = following_tokenizer(folder, folder, trust_remote_code=code)
        refuse_long_windows("--window-length", request.window_length, config)
        require_text(
            request.text, tokenizer, count=request.window_count, length=request.window_length
        )
        vocabulary_size = config.get_text_config().vocab_size
        dtype = DTYPES[recipe["dtype"]]
        return cls(modules, recipe, report, tokenizer, dtype, vocabulary_size)


def _factored_modules(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "config.json"
    quantization = json_field(read_json_object(path), "quantization_config", dict, path, default={})
    modules = json_field(quantization or {}, "modules", dict, path, default=None)
    if not modules:
        raise InputError(
            "The checkpoint has no factored layers.",
            where=folder / "config.json",
            observed="a model that skipcat did not compress, or kept dense throughout",
            expected="a folder that skipcat compress wrote",
        )
    return modules
