"""What every linear of an image classifier is given, and how much the output minds its errors.

One hooked pass forward and back. For y = W x, g is the gradient of log p(t) by y, t drawn from the
model's own distribution over its classes: no label is needed. An image gives T inputs x, one for
each of its patches, and one KL; with G the sum of g g^T over them (mean over images) and S the mean
of x x^T, an error D of W costs tr(G D S D^T) / 2 nats an image, x and g taken as independent
(K-FAC). T differs from stage to stage in a Swin; the sum takes care of it.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import (
    Call,
    not_finite,
    seeing_gradients,
    seeing_inputs,
    stopping_at,
)
from pipeline.calibrate.moments import DrawnMoments, SecondMoment
from pipeline.errors import InputError
from pipeline.model.structure import Layer, evaluating
from pipeline.progress import track

# Labels drawn for an image: a class that is almost sure leaves almost no gradient, so the few draws
# that differ carry most of the Fisher information.
DRAWS = 4


def measure_whole(
    model: PreTrainedModel,
    layers: list[Layer],
    pixels: torch.Tensor,
    *,
    gradients: bool,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, DrawnMoments]:
    """Run the images forward and, if asked, back, with every linear of the groups watched.

    Args:
        model: a classifier in float32; it is not changed.
        layers: its structure.
        pixels: float32 [N, C, H, W].
        gradients: whether what the outputs are worth is wanted.
        seed: of the labels that are drawn.
        batch_size: images at once.

    Returns:
        Group name -> its moments, DRAWS gradients an image.

    Raises:
        InputError: activations or gradients that are not finite.
    """
    groups = [group for layer in layers for group in layer.groups]
    found = {g.name: DrawnMoments(g.in_features, g.heights) for g in groups}
    generator = torch.Generator().manual_seed(seed)
    watching: AbstractContextManager[None] = (
        seeing_gradients(model, found)
        if gradients
        else seeing_inputs(model, {name: moments.see_input for name, moments in found.items()})
    )
    with watching, evaluating(model):
        for batch in track(list(pixels.split(batch_size)), "what the linears see"):
            if gradients:
                _forward_and_back(model, batch, generator)
            else:
                with torch.no_grad():
                    model(pixel_values=batch)
    return found


def _forward_and_back(
    model: PreTrainedModel, batch: torch.Tensor, generator: torch.Generator
) -> None:
    pixels = batch.clone().requires_grad_()  # parameters are frozen: the graph starts here
    with torch.enable_grad():
        logits = model(pixel_values=pixels).logits
    chances = logits.detach().double().softmax(dim=-1)
    if not torch.isfinite(chances).all():
        raise InputError(
            "The model's logits are not finite.",
            where=type(model).__name__,
            change="load the model in float32, and check its weights and images",
        )
    for draw in range(DRAWS):
        drawn = torch.multinomial(chances, 1, generator=generator)
        residual = -chances.scatter_add(1, drawn, -torch.ones_like(drawn).double())
        torch.autograd.grad(
            logits, pixels, residual.to(logits.dtype), retain_graph=draw + 1 < DRAWS
        )


class PairedModel:
    """The original and the compressed classifier side by side, at the inputs of one layer.

    For each layer in turn: `enter`, then for each group in the order the layer runs them `measure`
    and replace it in `model`, then `leave`.

    Args:
        model: changed as the layers are replaced; a copy of it stays the original.
        layers: its structure, in the order in which they run.
        pixels: float32 [N, C, H, W].
        batch_size: images at once.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[Layer], pixels: torch.Tensor, batch_size: int
    ) -> None:
        self.model, self.layers = model, layers
        self.original = copy.deepcopy(model)
        self.batches = list(pixels.split(batch_size))
        self._given: list[tuple[Call, Call]] = []

    def enter(self, index: int, *, measure: bool = True) -> None:
        self._given = []

    @torch.no_grad()
    def measure(self, index: int, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments of the group's input x' in the compressed model, and of its distance from x.

        Returns:
            E[x' x'^T] and E[(x - x') x'^T], float64 [n, n].

        Raises:
            InputError: activations that are not finite.
        """
        layer = self.layers[index].name
        self._given = self._given or [self._calls(layer, batch) for batch in self.batches]
        width = self.original.get_submodule(group).in_features
        seen, drift = SecondMoment(width), torch.zeros(width, width, dtype=torch.float64)
        for original, compressed in self._given:
            x = _input_of(self.original, layer, group, original)
            own = _input_of(self.model, layer, group, compressed)
            try:
                seen.add_(own)
            except ValueError as error:
                raise not_finite(group, error) from error
            drift += (x - own).T @ own
        return seen.mean(), drift / seen.tokens

    def leave(self, index: int) -> None:
        self._given = []

    def _calls(self, layer: str, batch: torch.Tensor) -> tuple[Call, Call]:
        """What the layer is called with in the original and in the compressed model."""
        pair = []
        for model in (self.original, self.model):
            with stopping_at(model.get_submodule(layer)) as caught:
                model(pixel_values=batch)
            pair.append(caught[0])
        return pair[0], pair[1]


def _input_of(model: PreTrainedModel, layer: str, linear: str, call: Call) -> torch.Tensor:
    """What a linear reads when its layer is called so, float32 [tokens, n]."""
    args, keywords = call
    with stopping_at(model.get_submodule(linear)) as caught:
        model.get_submodule(layer)(*args, **keywords)
    (inputs,), _ = caught[0]
    return inputs.flatten(0, -2).float()
