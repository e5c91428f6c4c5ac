"""The sweep back, layer by layer, against one ordinary backward pass through the whole model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate import fisher, precision
from pipeline.calibrate.fisher import BackwardSweep, _drawn_minus_expected
from pipeline.calibrate.moments import _LARGEST_NORM, GroupMoments
from pipeline.errors import InputError
from pipeline.kept_tensors import keep_tensors
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model

BATCH, LENGTH, SEED = 2, 20, 3
TOKENS = torch.randint(0, 256, (5, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)


@pytest.fixture
def _nothing_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sweep keeps on disk is kept in float32."""

    def write(path: Path, batches: list[torch.Tensor]) -> None:
        keep_tensors(path, {str(i): b.contiguous().clone() for i, b in enumerate(batches)})

    monkeypatch.setattr(fisher, "_write", write)


def swept(model: PreTrainedModel, folder: Path, seed: int = SEED) -> dict[str, GroupMoments]:
    layers = decoder_structure(model)
    sweep = BackwardSweep(model, layers, TOKENS, folder, seed=seed, batch_size=BATCH)
    sweep.forward()
    moments: dict[str, GroupMoments] = {}
    for index in reversed(range(len(layers))):
        moments |= sweep.backward(index)
    sweep.remove()
    return moments


@dataclass
class Reference:
    """Sums over all tokens, as one pass through the model gives them, float64."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    weighted: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, kind: str, name: str, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).double()
        found = rows.T @ (rows if weights is None else rows * weights[:, None])
        held = getattr(self, kind)
        held[name] = held.get(name, 0) + found


def reference(model: PreTrainedModel) -> Reference:
    """By autograd through the whole model, for the tokens that the sweep draws."""
    groups = [group for layer in decoder_structure(model) for group in layer.groups]
    members = [member for group in groups for member in group.members]
    generator = torch.Generator().manual_seed(SEED)
    result = Reference()
    for batch in TOKENS.split(BATCH):
        logits, seen = logits_and_calls(model, members, batch)
        residual = fisher._drawn_minus_expected(logits.detach(), generator)
        found = torch.autograd.grad(logits, [seen[m][1] for m in members], residual)
        gradients = {m: g.flatten(0, 1).double() for m, g in zip(members, found, strict=True)}
        for group in groups:
            squares = [gradients[member].square().sum(1) for member in group.members]
            # Else the sweep would cut them.
            assert all((s <= _LARGEST_NORM**2 * s.mean()).all() for s in squares)
            weights = torch.stack([s / s.mean() for s in squares]).mean(0)
            x = seen[group.name][0].detach()
            result.add("inputs", group.name, x, None)
            result.add("weighted", group.name, x, weights)
            for member in group.members:
                result.add("outputs", member, gradients[member], None)
    return result


def logits_and_calls(
    model: PreTrainedModel, members: list[str], batch: torch.Tensor
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Logits of a batch, and the input and output of each named linear on the way to them."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        model.get_submodule(member).register_forward_hook(
            lambda module, args, output, member=member: seen.update({member: (args[0], output)})
        )
        for member in members
    ]
    logits = model(batch).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


def largest_distance(moments: dict[str, GroupMoments], expected: Reference) -> float:
    distances = []
    for name, group in moments.items():
        distances.append(distance(group.inputs.total, expected.inputs[name]))
        distances.append(distance(group.weighted.total, expected.weighted[name]))
        distances += [distance(g.total, expected.outputs[m]) for m, g in group.outputs.items()]
        assert all(g.tokens == TOKENS.numel() for g in group.outputs.values())
    return max(distances)


@pytest.mark.usefixtures("_nothing_rounded")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_sweep_are_those_of_one_backward_pass(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, layers=3)
    expected = reference(model)
    moments = swept(model, tmp_path / "sweep")
    names = {m for group in moments.values() for m in group.outputs}
    assert (moments.keys(), names) == (expected.inputs.keys(), expected.outputs.keys())
    # Float32 sums in another order, through three layers.
    assert largest_distance(moments, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_disk_rounds_away_is_within_its_digits(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, layers=3)
    # bfloat16 keeps 2^-9 of the input and of the gradient of every layer; moments are squares.
    found = largest_distance(swept(model, tmp_path / "sweep"), reference(model))
    assert 0 < found < 10 * 2**-9


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bfloat16_products_change_the_moments_little(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def independent(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Tokens that are not drawn otherwise where rounding has changed the logits."""
        drawn = torch.randint(256, (*logits.shape[:-1], 1), generator=generator)
        return (-logits.softmax(-1)).scatter_add_(-1, drawn, torch.ones(drawn.shape))

    monkeypatch.setattr(fisher, "_drawn_minus_expected", independent)
    model = tiny_model(family)
    expected = reference(model)
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: True)
    # 2^-9 in each of some thirty products, forward and back.
    assert largest_distance(swept(model, tmp_path / "sweep"), expected) < 30 * 2**-9


def test_the_seed_decides_which_tokens_are_drawn(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    model = tiny_model("llama")
    first, again, other = (
        swept(model, tmp_path / "sweep", seed)[name].outputs[name].total for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_over_draws_the_squared_residual_is_the_covariance_of_the_drawn_token() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    count = 100_000
    residual = _drawn_minus_expected(
        logits.expand(2, count // 2, 5), torch.Generator().manual_seed(0)
    )
    assert residual.shape == (2, count // 2, 5)
    rows = residual.reshape(count, 5)
    p = logits.softmax(0)
    # Averages of numbers below one over 1e5 draws: four standard errors are below 0.01.
    torch.testing.assert_close(rows.mean(0), torch.zeros(5), rtol=0, atol=0.01)
    fisher = rows.T @ rows / count
    torch.testing.assert_close(fisher, torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.01)


def test_a_token_of_all_the_probability_leaves_no_residual() -> None:
    logits = torch.full((4, 6), -100.0)
    logits[:, 5] = 100.0
    residual = _drawn_minus_expected(logits, torch.Generator().manual_seed(0))
    assert torch.equal(residual, torch.zeros(4, 6))


def test_the_model_and_its_flags_are_left_as_they_were(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    swept(model, tmp_path / "sweep")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1"),
        ("model.layers.2.self_attn.q_proj", "model.layers.2"),
        ("lm_head", "model.layers.2"),
    ],
)
def test_weights_that_are_not_finite_name_the_layer(
    broken: str, named: str, tmp_path: Path
) -> None:
    model = tiny_model("llama", layers=3)
    nn.init.constant_(model.get_submodule(broken).weight, float("nan"))
    with pytest.raises(InputError, match="not finite") as caught:
        swept(model, tmp_path / "sweep")
    assert caught.value.details["where"] == named


def test_a_gradient_that_overflows_on_the_way_back_names_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", layers=3)
    through = BackwardSweep._through

    def overflowing(sweep: BackwardSweep, index: int, *rest: torch.Tensor) -> torch.Tensor:
        before = through(sweep, index, *rest)
        return before * torch.inf if index == 1 else before

    monkeypatch.setattr(BackwardSweep, "_through", overflowing)
    with pytest.raises(InputError, match="not finite") as caught:
        swept(model, tmp_path / "sweep")
    assert caught.value.details["where"] == "model.layers.1"
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
