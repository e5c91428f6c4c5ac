"""The embedding and the head in few bits: what that costs, measured, and how it is done.

They have no layer of their own in the survey, and few enough formats to try each: the KL to the
model as it is, on a few windows, with nothing else changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.moments import SecondMoment
from pipeline.checkpoint.install import dense_tensors, install_
from pipeline.compress.factorize.quantized_factors import nearest
from pipeline.compress.factorize.whitened_svd import shrunk
from pipeline.compress.plan.bit_search import TableChoice
from pipeline.compress.plan.file_bytes import matrix_bytes
from pipeline.model.embeddings import find_tables
from pipeline.progress import track
from pipeline.quantize.formats import Format, Runtime, parse_format
from pipeline.quantize.gptq import round_with_feedback
from pipeline.quantize.groupwise import Blocks

# A matrix that is embedding and head answers for both: half of what its error costs is taken to be
# the same in every direction.
TIED_SHRINKAGE = 0.5
WINDOWS = 3


@torch.no_grad()
def table_choices(
    model: PreTrainedModel, tokens: torch.Tensor, runtime: Runtime
) -> list[list[TableChoice]]:
    """Every way to store the embedding and the head, with its bytes and its cost.

    Args:
        model: a decoder in evaluation mode; it is as it was afterwards.
        tokens: calibration tokens, int64 [N, T]; a few of the windows are used.
        runtime: formats, and what they take in its file.

    Returns:
        For each matrix its choices: as it is, and in each format.
    """
    windows = tokens[:WINDOWS]
    every = []
    for names in find_tables(model).groups:
        rows, columns = model.get_submodule(names[0]).weight.shape
        whole = TableChoice({}, matrix_bytes(rows, columns, None, runtime), 0.0)
        taken = [style for style in runtime.table if runtime.accepts(style, columns)]
        styles = list(track(taken, f"formats of {names[0]}"))
        codes = [round_table(model, names, style, windows) for style in styles]
        losses = _losses(model, names, styles, codes, windows)
        every.append(
            [whole]
            + [
                TableChoice(
                    dict.fromkeys(names, style.name),
                    matrix_bytes(rows, columns, style, runtime)
                    + _looked_up_bytes(model, names, style, runtime),
                    loss,
                )
                for style, loss in zip(styles, losses, strict=True)
            ]
        )
    return every


def round_tables_(
    model: PreTrainedModel, styles: dict[str, str], tokens: torch.Tensor, *, plain: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Bring the embedding and the head into the formats of a plan, in place.

    Args:
        model: changed; where both are one matrix its config says afterwards that they are not
            tied, since the entries say how they share it.
        styles: module name -> format.
        tokens: calibration tokens, int64 [N, T].
        plain: round each number to its nearest.

    Returns:
        `quantization_config.modules` entries, and the tensors to be stored.
    """
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for names in find_tables(model).groups:
        if names[0] not in styles:
            continue
        style = parse_format(styles[names[0]])
        if plain:
            codes = nearest(model.get_submodule(names[0]).weight.detach(), style)
        else:
            codes = round_table(model, names, style, tokens[:WINDOWS])
        new_entries = table_entries(model, names, style)
        new = dense_tensors(names[:1], [len(codes.codes)], codes)
        install_(model, new_entries, new)
        entries |= new_entries
        tensors |= new
        if len(names) > 1:
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}
    return entries, tensors


def _looked_up_bytes(
    model: PreTrainedModel, names: tuple[str, ...], style: Format, runtime: Runtime
) -> int:
    """What looking rows up takes beside what multiplying takes: both read the same codes.

    ONNX Runtime's operators want scales in two shapes, and one of them a byte for a zero point.
    """
    owner = model.get_submodule(names[0])
    if runtime.name != "cpu" or not isinstance(owner, nn.Embedding):
        return 0
    rows, columns = owner.weight.shape
    blocks = style.blocks(columns)
    scales = blocks * runtime.scale_bytes
    zeros = {"sym": 0, "asym": blocks, "offset": scales}[style.zero]
    if len(names) > 1:
        return rows * (scales + zeros)
    return rows * (zeros - style.zero_bytes(columns, runtime.scale_bytes))


def table_entries(
    model: PreTrainedModel, names: tuple[str, ...], style: Format
) -> dict[str, dict[str, Any]]:
    """`quantization_config.modules` entries of one matrix, the owner first."""
    owner = names[0]
    form = "table" if isinstance(model.get_submodule(owner), nn.Embedding) else "dense"
    rank = min(model.get_submodule(owner).weight.shape)
    entry = {"rank": rank, "up_style": style.name}
    entries = {owner: entry | {"form": form, "owner": None}}
    return entries | {name: entry | {"form": "head", "owner": owner} for name in names[1:]}


def round_table(
    model: PreTrainedModel, names: tuple[str, ...], style: Format, windows: torch.Tensor
) -> Blocks:
    """The codes of one matrix: of a head with errors fed forward, else to the nearest.

    Args:
        model: not changed.
        names: of the modules that share it.
        style: the format.
        windows: tokens that tell what the head reads, int64 [N, T].
    """
    weight = model.get_submodule(names[0]).weight.detach()
    heads = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if not heads:
        return nearest(weight, style)
    moment = _input_moment(model, heads[0], windows)
    if len(names) > 1:
        moment = shrunk(moment, TIED_SHRINKAGE)
    return round_with_feedback(weight, style, moment)


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
    styles: Sequence[Format],
    codes: Sequence[Blocks],
    windows: torch.Tensor,
) -> list[float]:
    """Mean KL to the model as it is, nats per token, of each format."""
    expected = [_log_chances(model, window) for window in windows]
    losses = []
    for style, blocks in track(list(zip(styles, codes, strict=True)), f"cost of {names[0]}"):
        with _rounded(model, names, style, blocks):
            found = [_log_chances(model, window) for window in windows]
        kls = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(expected, found, strict=True)]
        losses.append(float(torch.stack(kls).mean()))
    return losses


def _log_chances(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Log probabilities of every next token, float32 [T, V]."""
    return model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)


@contextmanager
def _rounded(
    model: PreTrainedModel, names: tuple[str, ...], style: Format, codes: Blocks
) -> Iterator[None]:
    """The matrix in few bits inside, as it was after."""
    before = {name: model.get_submodule(name) for name in names}
    tensors = dense_tensors(names[:1], [len(codes.codes)], codes)
    install_(model, table_entries(model, names, style), tensors)
    try:
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
