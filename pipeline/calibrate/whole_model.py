"""What every linear of an image classifier is given, and how much the output minds its errors.

One hooked pass forward and back. For y = W x, g is the gradient of log p(t) by y, t drawn from the
model's own distribution over its classes: no label is needed. An image gives T inputs x, one for
each of its patches, and one KL; with G the sum of g g^T over them (mean over images) and S the mean
of x x^T, an error D of W costs tr(G D S D^T) / 2 nats an image, x and g taken as independent
(K-FAC). T differs from stage to stage in a Swin; the sum takes care of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import not_finite
from pipeline.calibrate.moments import SecondMoment, balanced, gram
from pipeline.compress.factorize.whitened_svd import shrunk, tails_of, whitened_energies
from pipeline.compress.forms import Form
from pipeline.compress.plan.bit_search import Noises
from pipeline.compress.plan.layer_costs import SENSITIVITY_SHRINKAGE
from pipeline.compress.plan.quantization_costs import stack_noise
from pipeline.compress.plan.rank_search import Curves, Members, stacks_of
from pipeline.errors import InputError
from pipeline.model.structure import Group, Layer, evaluating
from pipeline.progress import track
from pipeline.quantize.formats import Format

# Labels drawn for an image: a class that is almost sure leaves almost no gradient, so the few draws
# that differ carry most of the Fisher information.
DRAWS = 4


class GroupSums:
    """Running sums for the linears of one group.

    Attributes:
        inputs: S of the input.
        weighted: the same, each input weighted by its squared gradient; float32 [n, n].
        outputs: member -> sum of g g^T, float32 [m, m].
    """

    def __init__(self, group: Group) -> None:
        self.inputs = SecondMoment(group.in_features)
        self.weighted = torch.zeros(group.in_features, group.in_features)
        self.outputs = {
            member: torch.zeros(height, height)
            for member, height in zip(group.members, group.out_features, strict=True)
        }
        self._rows = torch.empty(0, group.in_features)
        self._squares: list[torch.Tensor] = []

    def see_input(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs, float [..., n]; gradients of it follow.

        Raises:
            ValueError: NaN or infinite values.
        """
        self._rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.inputs.add_(self._rows)

    def see_gradient(self, member: str, gradients: torch.Tensor) -> None:
        """Add the gradients by a member's output for one draw of labels, float [..., m].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows = gradients.detach().reshape(-1, gradients.shape[-1]).float()
        squares = rows.square().sum(dim=1)
        if not torch.isfinite(squares).all():
            raise ValueError("NaN or infinite gradients")
        self.outputs[member] += gram(rows)
        self._squares.append(squares)
        if len(self._squares) == len(self.outputs):
            weights = torch.stack(self._squares).mean(dim=0)
            self.weighted += gram(self._rows * weights.sqrt()[:, None])
            self._squares = []


class ImageSurvey:
    """Statistics of an image classifier, in memory: `GroupStatistics` and the plain moments.

    Args:
        model: in evaluation mode, float32; it is not changed.
        layers: its structure.

    Attributes:
        curves: expected KL, nats an image, of every stack at every rank from 0 to full.
        noises: what rounding is expected to add to it; empty where no formats were asked for.
        images: how many were seen.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        self.model, self.layers = model, layers
        self.groups = {m: g for layer in layers for g in layer.groups for m in g.members}
        self.sums = {g.name: GroupSums(g) for layer in layers for g in layer.groups}
        self.curves: Curves = {}
        self.noises: Noises = {}
        self.images = 0

    def measure(
        self,
        pixels: torch.Tensor,
        *,
        gradients: bool,
        cat: bool = True,
        seed: int = 0,
        styles: Sequence[Format] = (),
        form: Form = "skip",
        batch_size: int = 16,
    ) -> None:
        """Run the images forward and, if asked, back; then compute the curves.

        Args:
            pixels: float32 [N, C, H, W].
            gradients: whether sensitivities and curves are wanted.
            cat: whether stacks of several members are wanted.
            seed: of the labels that are drawn.
            styles: formats of few bits whose cost is wanted, too.
            form: of the factors that will be rounded.
            batch_size: images at once.

        Raises:
            InputError: activations or gradients that are not finite, or gradients that are zero.
        """
        generator = torch.Generator().manual_seed(seed)
        batches = list(pixels.split(batch_size))
        with self._watching(gradients), evaluating(self.model):
            for batch in track(batches, "what the linears see"):
                if gradients:
                    self._forward_and_back(batch, generator)
                else:
                    with torch.no_grad():
                        self.model(pixel_values=batch)
        self.images += len(pixels)
        if gradients:
            self._make_curves(cat, styles, form)

    def moment(self, members: Members) -> torch.Tensor:
        """S = E[x x^T] of what the members read in the original model, float64 [n, n]."""
        return self.sums[self.groups[members[0]].name].inputs.mean()

    def sensitivities(self, members: Members) -> list[torch.Tensor]:
        """Shrunk G of each member's output, summed over an image, float64 [m_i, m_i]."""
        sums = self.sums[self.groups[members[0]].name]
        scale = 1 / (DRAWS * self.images)
        return [shrunk(sums.outputs[member] * scale, SENSITIVITY_SHRINKAGE) for member in members]

    def geometry(self, members: Members, moment: torch.Tensor) -> torch.Tensor:
        """What errors of the members are measured in: `moment`, balanced with the weighted one."""
        return balanced(moment, self.sums[self.groups[members[0]].name].weighted)

    def _make_curves(self, cat: bool, styles: Sequence[Format], form: Form) -> None:
        for group in dict.fromkeys(self.groups.values()):
            geometry = self.geometry(group.members, self.moment(group.members))
            weights = {m: self.model.get_submodule(m).weight.detach() for m in group.members}
            for stack in stacks_of(group, cat=cat):
                stacked, blocks = torch.cat([weights[m] for m in stack]), self.sensitivities(stack)
                try:
                    energies = whitened_energies(stacked, geometry, blocks)
                    if styles:
                        self.noises[stack] = stack_noise(stacked, geometry, blocks, styles, form)
                except ValueError as error:
                    raise not_finite(", ".join(stack), error) from error
                self.curves[stack] = (tails_of(energies) / 2).numpy()

    def _forward_and_back(self, batch: torch.Tensor, generator: torch.Generator) -> None:
        pixels = batch.clone().requires_grad_()  # parameters are frozen: the graph starts here
        with torch.enable_grad():
            logits = self.model(pixel_values=pixels).logits
        chances = logits.detach().double().softmax(dim=-1)
        if not torch.isfinite(chances).all():
            raise InputError(
                "The model's logits are not finite.",
                where=type(self.model).__name__,
                change="load the model in float32, and check its weights and images",
            )
        for draw in range(DRAWS):
            drawn = torch.multinomial(chances, 1, generator=generator)
            residual = -chances.scatter_add(1, drawn, -torch.ones_like(drawn).double())
            torch.autograd.grad(
                logits, pixels, residual.to(logits.dtype), retain_graph=draw + 1 < DRAWS
            )

    @contextmanager
    def _watching(self, gradients: bool) -> Iterator[None]:
        """Hooks on every linear of the groups, and frozen parameters."""
        hooks: list[Any] = []
        for name, sums in self.sums.items():
            linear = self.model.get_submodule(name)
            hooks.append(linear.register_forward_pre_hook(_seeing_input(name, sums)))
            for member in sums.outputs if gradients else ():
                linear = self.model.get_submodule(member)
                hooks.append(linear.register_forward_hook(_seeing_gradient(member, sums)))
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)


def _seeing_input(name: str, sums: GroupSums) -> Any:
    def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        try:
            sums.see_input(args[0])
        except ValueError as error:
            raise not_finite(name, error) from error

    return see


def _seeing_gradient(member: str, sums: GroupSums) -> Any:
    def see(gradient: torch.Tensor) -> None:
        try:
            sums.see_gradient(member, gradient)
        except ValueError as error:
            raise not_finite(member, error) from error

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(see)

    return watch
