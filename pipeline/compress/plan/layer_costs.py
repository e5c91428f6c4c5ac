"""What every layer's matrices are worth: loss curves and sensitivities, kept layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.artefact import write_json
from pipeline.calibrate.fisher import BackwardSweep
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.moments import GroupMoments, balanced
from pipeline.calibrate.precision import fast_products
from pipeline.compress.factorize.whitened_svd import shrunk, tails_of, whitened_energies
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.forms import Form
from pipeline.compress.plan.bit_search import Noises, TableChoice
from pipeline.compress.plan.quantization_costs import StackNoise, stack_noise
from pipeline.compress.plan.rank_search import Curves, Members, stacks_of
from pipeline.model.structure import Group, Layer
from pipeline.progress import track
from pipeline.quantize.formats import Format

# Of the sensitivities, which are estimated from few tokens.
SENSITIVITY_SHRINKAGE = 0.1
JOIN = "+"


class Survey:
    """Curves and sensitivities of a model, in a folder, measured as far as they are missing.

    Args:
        folder: where they are kept; an interrupted survey continues there.
        settings: everything they depend on; compared when a survey is taken up again.

    Attributes:
        curves: expected KL, nats per token, of every stack at every rank from 0 to full.
        noises: what rounding is expected to add to it; empty where no formats were asked for.

    Raises:
        InputError: the folder holds a survey with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.finished = FinishedLayers(folder / "layers", settings)
        self.curves: Curves = {}
        self.noises: Noises = {}
        self._layer_of: dict[str, str] = {}
        self._source_of: dict[str, str] = {}

    def measure(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        *,
        cat: bool,
        seed: int,
        styles: Sequence[Format] = (),
        form: Form = "skip",
    ) -> None:
        """Sweep the model forward and back, but for the layers that are finished.

        Args:
            model: a decoder in evaluation mode; it is not changed.
            layers: its structure.
            tokens: int64 [N, T].
            cat: whether stacks of several members are wanted.
            seed: of the tokens that are drawn from the model.
            styles: formats of few bits whose cost is wanted, too.
            form: of the factors that will be rounded.
        """
        missing = [i for i, layer in enumerate(layers) if layer.name not in self.finished]
        if missing:
            sweep = BackwardSweep(model, layers, tokens, self.folder / "sweep", seed=seed)
            back = range(sweep.forward(missing[-1]), missing[0] - 1, -1)
            for index in track(back, "sensitivity, backward"):
                moments = sweep.backward(index)
                if index in missing:
                    tensors = _layer_tensors(model, layers[index], moments, cat, styles, form)
                    self.finished.add(layers[index].name, tensors, [])
            sweep.remove()
        for layer in layers:
            self._layer_of |= {m: layer.name for group in layer.groups for m in group.members}
            self._source_of |= {m: group.name for group in layer.groups for m in group.members}
            tensors, _ = self.finished.load(layer.name)
            for name, curve in tensors.items():
                if name.startswith("curve."):
                    members = tuple(name.removeprefix("curve.").split(JOIN))
                    self.curves[members] = curve.numpy()
            self.noises |= noises_in(tensors)

    def kept_choices(
        self, name: str, measure: Callable[[], list[list[TableChoice]]]
    ) -> list[list[TableChoice]]:
        """What `measure` returns, kept in the folder so that it is measured once."""
        path = self.folder / f"{name}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            return [[TableChoice(**choice) for choice in choices] for choices in kept]
        found = measure()
        write_json(path, [[asdict(choice) for choice in choices] for choices in found])
        return found

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        """Shrunk G of each member's output, float64 [m_i, m_i]."""
        tensors = self._tensors(members)
        return [shrunk(tensors[f"sensitivity.{m}"], SENSITIVITY_SHRINKAGE) for m in members]

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        """What errors of the members are measured in: `moment`, balanced with the weighted one.

        Args:
            members: that read the same input.
            moment: S of that input over all calibration tokens, float64 [n, n].
        """
        return balanced(moment, self._tensors(members)[f"weighted.{self._source_of[members[0]]}"])

    def _tensors(self, members: Members) -> dict[str, torch.Tensor]:
        tensors, _ = self.finished.load(self._layer_of[members[0]])
        return tensors


def survey_bytes(layers: list[Layer], tokens: int) -> int:
    """Bytes on disk that a survey of so many tokens takes, but for its curves."""
    groups = [group for layer in layers for group in layer.groups]
    moments = sum(4 * g.in_features**2 + 2 * sum(h * h for h in g.out_features) for g in groups)
    return moments + 2 * len(layers) * tokens * layers[0].groups[0].in_features


def _layer_tensors(
    model: PreTrainedModel,
    layer: Layer,
    moments: dict[str, GroupMoments],
    cat: bool,
    styles: Sequence[Format],
    form: Form,
) -> dict[str, torch.Tensor]:
    """What is kept of a layer: sensitivities, weighted moments, curve and noise of each stack."""
    kept: dict[str, torch.Tensor] = {}
    for group in layer.groups:
        found = moments[group.name]
        # In bfloat16, which halves the disk they take; it rounds away less than the shrinkage.
        kept |= {f"sensitivity.{m}": g.mean().bfloat16() for m, g in found.outputs.items()}
        kept[f"weighted.{group.name}"] = found.weighted.mean().float()
        kept |= _group_curves(model, group, found, cat, styles, form)
    return kept


def _group_curves(
    model: PreTrainedModel,
    group: Group,
    moments: GroupMoments,
    cat: bool,
    styles: Sequence[Format],
    form: Form,
) -> dict[str, torch.Tensor]:
    geometry = balanced(moments.inputs.mean(), moments.weighted.mean())
    weight = {m: model.get_submodule(m).weight.detach() for m in group.members}
    blocks = {m: shrunk(g.mean(), SENSITIVITY_SHRINKAGE) for m, g in moments.outputs.items()}
    curves = {}
    for stack in stacks_of(group, cat=cat):
        stacked, parts = torch.cat([weight[m] for m in stack]), [blocks[m] for m in stack]
        energies = whitened_energies(stacked, geometry, parts)
        curves[f"curve.{JOIN.join(stack)}"] = tails_of(energies) / 2
        if styles:
            noise = stack_noise(stacked, geometry, parts, styles, form)
            curves |= noise_tensors(stack, noise)
    return curves


def noise_tensors(members: Members, noise: StackNoise) -> dict[str, torch.Tensor]:
    """A stack's noise as tensors to be kept, by name."""
    return {
        f"noise.{name}.{JOIN.join(members)}": torch.from_numpy(array)
        for name, array in vars(noise).items()
    }


def noises_in(tensors: dict[str, torch.Tensor]) -> Noises:
    """The inverse of `noise_tensors`, for all stacks among the tensors of a layer."""
    parts: dict[Members, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "noise":
            field, _, members = rest.partition(".")
            parts.setdefault(tuple(members.split(JOIN)), {})[field] = tensor.numpy()
    return {members: StackNoise(**fields) for members, fields in parts.items()}


def output_tails(
    model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor
) -> dict[str, np.ndarray]:
    """What each linear alone loses of its output at each rank: E |(W - W_r) x|^2.

    Args:
        model: a decoder in evaluation mode; it is not changed.
        layers: its structure.
        tokens: int64 [N, T].

    Returns:
        Linear -> float64 [min(m, n) + 1].
    """
    stream = LayerStream(model, layers, tokens)
    tails = {}
    for index, layer in enumerate(track(layers, "truncation losses")):
        with fast_products(model):
            moments = stream.advance(index)
        for group in layer.groups:
            inputs = moments[group.name].mean()
            for member in group.members:
                weight = model.get_submodule(member).weight.detach()
                tails[member] = tails_of(whitened_energies(weight, inputs)).numpy()
    return tails


class GroupStatistics(Protocol):
    """Statistics of the linears of a model, by the names of linears that read the same input.

    `Survey` has them of a decoder, `pipeline.calibrate.whole_model.ImageSurvey` of a classifier.

    Attributes:
        curves: expected KL to the original, nats, of every stack at every rank from 0 to full.
        noises: what rounding is expected to add to it; empty where no formats were asked for.
    """

    curves: Curves
    noises: Noises

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        """Shrunk G = E[g g^T] of each member's output, float64 [m_i, m_i], of full rank."""
        ...

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        """What errors of the members are measured in.

        Args:
            members: that read the same input.
            moment: S of that input, float64 [n, n], in whichever model it was measured.

        Returns:
            float64 [n, n].
        """
        ...
