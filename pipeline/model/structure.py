"""What a decoder is made of, found by running it: its layers, and the linears that share an input.

No list of architectures and no list of names. A model is accepted when it is a chain of layers,
each fed by the one before, whose matrices all belong to nn.Linear modules called once a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input.

    Attributes:
        members: dotted module names, in the order the model declares them.
        in_features: width of the input, n.
        out_features: height of each member, m.
    """

    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def name(self) -> str:
        """The first member stands for the group."""
        return self.members[0]

    @property
    def heights(self) -> dict[str, int]:
        """Member -> its height."""
        return dict(zip(self.members, self.out_features, strict=True))


@dataclass(frozen=True)
class Layer:
    """One decoder layer and its groups."""

    name: str
    groups: tuple[Group, ...]

    @property
    def largest_first(self) -> list[Group]:
        """The groups in an order in which what is left at the end keeps nobody waiting for long."""
        return sorted(self.groups, key=lambda g: -g.in_features - sum(g.out_features))


def decoder_structure(model: PreTrainedModel) -> list[Layer]:
    """Trace one short forward pass and read off the decoder's layers and groups.

    Raises:
        InputError: the model is not a chain of layers of nn.Linear, or its tokens see those after
            them; says what was found.
    """
    path, layers = layer_list(model)
    names = [f"{path}.{index}" for index in range(len(layers))]
    for name, layer in zip(names, layers, strict=True):
        _refuse_other_matrices(name, layer)
    calls = _trace(model, dict(zip(names, layers, strict=True)))
    _refuse_unchained(names, calls)
    _refuse_bidirectional(model)
    return [
        Layer(name, _groups(name, layer, calls)) for name, layer in zip(names, layers, strict=True)
    ]


def refuse_other_architectures(model: nn.Module, where: object) -> None:
    """Refuse what no stage takes, by the modules of a model that need hold no numbers.

    Args:
        model: may be on the meta device.
        where: its folder, for the message.

    Raises:
        InputError: a mixture of experts, or a model whose state is no cache of keys and values.
    """
    if getattr(model, "_is_stateful", False):
        raise InputError(
            "State-space and recurrent models are not supported.",
            where=where,
            observed=f"{type(model).__name__}, which carries a state from token to token",
            expected="a decoder whose layers keep keys and values alone",
        )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" or "Expert" in type(module).__name__:
            block = model.get_submodule(name.rpartition(".")[0])
            kinds = dict.fromkeys(type(child).__name__ for child in block.children())
            raise InputError(
                "Mixtures of experts are not supported.",
                where=where,
                observed=f"{name}, beside one another {', '.join(kinds)}",
                expected="a decoder whose layers are run for every token",
            )


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds most of the linear layers' parameters."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    weights = {name: _linear_parameters(module) for name, module in lists}
    best = max(lists, key=lambda entry: (weights[entry[0]], -len(entry[0])), default=None)
    if best is None or weights[best[0]] == 0:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise InputError(
            "No list of decoder layers made of nn.Linear was found.",
            where=type(model).__name__,
            observed=f"modules of kind {', '.join(kinds)}",
        )
    return best


def _linear_parameters(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _refuse_other_matrices(name: str, layer: nn.Module) -> None:
    """A parameter of two or more dimensions outside nn.Linear is not understood.

    But for gains of a norm, of which some have a vector for every head.
    """
    for child_name, child in layer.named_modules():
        if isinstance(child, nn.Linear) or type(child).__name__.endswith("Norm"):
            continue
        for parameter_name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                raise InputError(
                    "A decoder layer holds a matrix that is not an nn.Linear.",
                    where=f"{name}.{child_name}",
                    observed=f"{type(child).__name__}.{parameter_name} {tuple(parameter.shape)}",
                    expected="nn.Linear (no experts, no Conv1D)",
                )


@dataclass
class _Call:
    """One call of a module: the object it was given, and the one it returned."""

    module: str
    given: Any
    returned: Any = None


def _trace(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, list[_Call]]:
    """Calls of every layer and every linear in it, during one forward pass.

    Inputs are kept alive, so that `is` tells whether two modules were given the same tensor.
    """
    calls: dict[str, list[_Call]] = defaultdict(list)
    watched = dict(layers)
    for name, layer in layers.items():
        for child_name, child in layer.named_modules():
            if isinstance(child, nn.Linear):
                watched[f"{name}.{child_name}"] = child
    hooks = [
        module.register_forward_hook(_recorder(calls, n), with_kwargs=True)
        for n, module in watched.items()
    ]
    try:
        probe_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    """A few different tokens, int64 [1, S]."""
    vocab_size = model.config.get_text_config().vocab_size
    return torch.arange(_PROBE_TOKENS, device=model.device).remainder(vocab_size).unsqueeze(0)


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few different tokens, [1, S, V]."""
    return _logits(model, _probe_tokens(model))


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits without dropout and without a cache, [1, S, V]."""
    with evaluating(model):
        return model(input_ids=tokens, use_cache=False).logits


def _refuse_bidirectional(model: PreTrainedModel) -> None:
    """Raise InputError for a model in which a token sees those after it.

    An encoder such as BERT loads as a causal language model when its config does not say
    `is_decoder`; only running it tells. Two probes differ in their last token alone: before it,
    their logits must agree but for rounding.
    """
    tokens = _probe_tokens(model)
    other = tokens.clone()
    other[0, -1] = tokens[0, 0]
    before, after = (_logits(model, probe)[0, :-1].float() for probe in (tokens, other))
    change = float((before - after).abs().max())
    if change > 16 * torch.finfo(model.dtype).eps * float(before.abs().max()):
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise InputError(
            "The model is not causal: its tokens see those after them.",
            where=type(model).__name__,
            observed=f"{kind}; a change of the last token changes earlier logits by {change:.1e}",
            expected="a decoder language model",
        )


def _recorder(calls: dict[str, list[_Call]], name: str) -> Any:
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        calls[name].append(_Call(name, given, output))

    return record


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the earlier mode after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def hidden_states_of(output: Any) -> torch.Tensor:
    """A layer's hidden states, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _refuse_unchained(names: list[str], calls: dict[str, list[_Call]]) -> None:
    """Every layer must run once, on what the layer before it returned."""
    previous = None
    for name in names:
        if len(calls[name]) != 1:
            raise InputError(
                "A decoder layer is not run exactly once in a forward pass.",
                where=name,
                observed=f"{len(calls[name])} calls",
            )
        if previous is not None and calls[name][0].given is not previous:
            raise InputError(
                "A decoder layer is not fed by the layer before it alone.",
                where=name,
                observed="another tensor than the previous layer's output",
                expected="a plain chain of decoder layers",
            )
        previous = hidden_states_of(calls[name][0].returned)


def _groups(name: str, layer: nn.Module, calls: dict[str, list[_Call]]) -> tuple[Group, ...]:
    """Linears of one layer, gathered by the tensor object they were given."""
    by_input: dict[int, list[str]] = {}
    for child_name, child in layer.named_modules():
        if not isinstance(child, nn.Linear):
            continue
        full_name = f"{name}.{child_name}"
        if len(calls[full_name]) != 1:
            raise InputError(
                "A linear layer is not run exactly once in a forward pass.",
                where=full_name,
                observed=f"{len(calls[full_name])} calls",
                expected="1 (no routed experts, no shared layers)",
            )
        by_input.setdefault(id(calls[full_name][0].given), []).append(full_name)
    groups = []
    for members in by_input.values():
        modules = (layer.get_submodule(member.removeprefix(f"{name}.")) for member in members)
        linears = [module for module in modules if isinstance(module, nn.Linear)]
        heights = tuple(linear.out_features for linear in linears)
        groups.append(Group(tuple(members), linears[0].in_features, heights))
    return tuple(groups)
