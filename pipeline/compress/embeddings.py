"""The embedding and the LM head quantised: what that costs, measured, and how it is done.

They belong to no layer, and there are few enough formats to try each: the KL to the model as it is,
on a few windows, with nothing else changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.divergence import divergence, log_chances
from pipeline.calibrate.moments import SecondMoment
from pipeline.checkpoint.install import dense_tensors, install_
from pipeline.compress.factorize.factors import Rounding, rtn
from pipeline.compress.factorize.second_moments import shrunk
from pipeline.compress.plan.file_bytes import embedding_bytes
from pipeline.compress.plan.plan import EmbeddingChoice
from pipeline.progress import track
from pipeline.quantize.formats import Format, Runtime
from pipeline.quantize.gptq import gptq
from pipeline.quantize.groupwise import Blocks

# A matrix that is embedding and head answers for both: half of what its error costs is taken to be
# the same in every direction.
_TIED_SHRINKAGE = 0.5
_WINDOWS = 3


class Embeddings:
    """The embedding and the LM head of a language model: matrices as wide as the vocabulary.

    Args:
        model: a decoder in evaluation mode, which is asked for them.

    Attributes:
        embedding: dotted name; None where it is no plain nn.Embedding.
        head: dotted name; None where it is no plain nn.Linear.
        tied: both are one matrix.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        names = {id(module): name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tied = (
            embedding is not None
            and head is not None
            and getattr(embedding, "weight", None) is getattr(head, "weight", 0)
        )
        self.embedding = names[id(embedding)] if type(embedding) is nn.Embedding else None
        self.head = names[id(head)] if type(head) is nn.Linear else None

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the modules that are stored together, the owner of the matrix first."""
        if self.tied:
            both = (self.embedding, self.head)
            return () if None in both else (tuple(str(name) for name in both),)
        return tuple((name,) for name in (self.embedding, self.head) if name is not None)

    @torch.no_grad()
    def choices(self, tokens: torch.Tensor, runtime: Runtime) -> list[list[EmbeddingChoice]]:
        """Every way to store them, with its bytes and its cost; the model is as it was afterwards.

        Args:
            tokens: calibration tokens, int64 [N, T]; a few of the windows are used.
            runtime: formats, and what they take in its file.

        Returns:
            For each matrix its choices: as it is, and in each format.
        """
        model, windows = self.model, tokens[:_WINDOWS]
        every = []
        for names in self.groups:
            owner, shared = model.get_submodule(names[0]), len(names) > 1
            columns = owner.weight.shape[1]
            taken = [format for format in runtime.table if runtime.accepts(format, columns)]
            formats = list(track(taken, f"formats of {names[0]}"))
            codes = [_gptq(model, names, format, windows) for format in formats]
            losses = _losses(model, names, formats, codes, windows)
            sizes = [
                embedding_bytes(owner, shared=shared, format=format, runtime=runtime)
                for format in (None, *formats)
            ]
            chosen = [{}, *(dict.fromkeys(names, format.name) for format in formats)]
            every.append(list(map(EmbeddingChoice, chosen, sizes, [0.0, *losses])))
        return every

    def quantize_(
        self, formats: dict[str, str], tokens: torch.Tensor, rounding: Rounding
    ) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
        """Bring them into the formats of a plan, in place.

        Where both are one matrix the model's config says afterwards that they are not tied: the
        entries say how they share it.

        Args:
            formats: module name -> format.
            tokens: calibration tokens, int64 [N, T].
            rounding: the way; one that looks at no moments rounds each number to its nearest.

        Returns:
            `quantization_config.modules` entries, and the tensors to be stored.
        """
        model = self.model
        entries: dict[str, dict[str, Any]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for names in self.groups:
            if names[0] not in formats:
                continue
            format = Format.parse(formats[names[0]])
            if rounding.needs_moments:
                codes = _gptq(model, names, format, tokens[:_WINDOWS])
            else:
                codes = rtn(model.get_submodule(names[0]).weight.detach(), format)
            new_entries = _entries(model, names, format)
            new = dense_tensors(names[:1], [len(codes.codes)], codes)
            install_(model, new_entries, new)
            entries |= new_entries
            tensors |= new
            if len(names) > 1:
                model.config.tie_word_embeddings = False
                model.all_tied_weights_keys = {}
        return entries, tensors


def _entries(
    model: PreTrainedModel, names: tuple[str, ...], format: Format
) -> dict[str, dict[str, Any]]:
    """`quantization_config.modules` entries of one matrix, the owner first."""
    owner = names[0]
    form = "table" if isinstance(model.get_submodule(owner), nn.Embedding) else "dense"
    rank = min(model.get_submodule(owner).weight.shape)
    entry = {"rank": rank, "up_style": format.name}
    entries = {owner: entry | {"form": form, "owner": None}}
    return entries | {name: entry | {"form": "head", "owner": owner} for name in names[1:]}


def _gptq(
    model: PreTrainedModel, names: tuple[str, ...], format: Format, windows: torch.Tensor
) -> Blocks:
    """The codes of one matrix: of an LM head by GPTQ on the windows, int64 [N, T], else by RTN."""
    weight = model.get_submodule(names[0]).weight.detach()
    heads = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if not heads:
        return rtn(weight, format)
    moment = _input_moment(model, heads[0], windows)
    if len(names) > 1:
        moment = shrunk(moment, _TIED_SHRINKAGE)
    return gptq(weight, format, moment)


@torch.no_grad()
def _input_moment(model: PreTrainedModel, name: str, windows: torch.Tensor) -> torch.Tensor:
    """E[x x^T] of what a linear reads, float64 [n, n]."""
    linear = model.get_submodule(name)
    moment = SecondMoment(linear.in_features)
    hook = linear.register_forward_pre_hook(lambda _, args: moment.add_(args[0]))
    try:
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    finally:
        hook.remove()
    return moment.mean()


def _losses(
    model: PreTrainedModel,
    names: tuple[str, ...],
    formats: Sequence[Format],
    codes: Sequence[Blocks],
    windows: torch.Tensor,
) -> list[float]:
    """Mean KL to the model as it is, nats per token, of each format."""
    expected = [log_chances(_logits(model, window)) for window in windows]
    losses = []
    for format, blocks in track(list(zip(formats, codes, strict=True)), f"cost of {names[0]}"):
        with _rounded(model, names, format, blocks):
            kls = [
                divergence(before, _logits(model, window))
                for before, window in zip(expected, windows, strict=True)
            ]
        losses.append(sum(kls) / len(kls))
    return losses


def _logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Of every next token, [T, V]."""
    logits: torch.Tensor = model(input_ids=window[None], use_cache=False).logits
    return logits[0]


@contextmanager
def _rounded(
    model: PreTrainedModel, names: tuple[str, ...], format: Format, codes: Blocks
) -> Iterator[None]:
    """The matrix quantised inside, as it was after."""
    before = {name: model.get_submodule(name) for name in names}
    tensors = dense_tensors(names[:1], [len(codes.codes)], codes)
    install_(model, _entries(model, names, format), tensors)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
