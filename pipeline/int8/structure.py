"""Which convolutions a network has, what they read, and which tensors share a grid.

Read off the graph that torch.export makes of the network. What only moves numbers (concatenation,
maxima, nearest neighbours) leaves them on their grid, so that its inputs and outputs share one, and
no runtime has to change codes there. A tensor that no convolution reads is never rounded: the
outputs of heads stay float, and so does what is concatenated of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from pipeline.errors import InputError

# Operators of torch that give numbers which they were given, or 0.
_CARRIERS = frozenset(
    (
        *("cat", "max_pool2d", "max_pool2d_with_indices", "upsample_nearest2d", "channel_shuffle"),
        *("pixel_shuffle", "pixel_unshuffle", "view", "reshape", "flatten", "permute", "transpose"),
        *("slice", "select", "split", "split_with_sizes", "chunk", "unsqueeze", "squeeze"),
        *("contiguous", "clone", "dropout", "getitem"),
    )
)
_ACTIVATIONS = nn.ReLU.__module__


@dataclass(frozen=True)
class _ConvSite:
    """One convolution in its network.

    Attributes:
        reads: number of the grid of what it reads.
        source: the module whose output it reads as it is; None where something is between.
        norm: the batch normalisation that alone reads what it gives; None if there is none.
        gives: number of the grid of what it gives, with its norm; None where no convolution
            reads that, or an activation comes first.
        macs: multiplications of one call.
    """

    reads: int
    source: str | None
    norm: str | None
    gives: int | None
    macs: int


@dataclass(frozen=True)
class ConvStructure:
    """The convolutions of a network.

    Attributes:
        convs: by the names of their modules, in the order in which they run.
        activations: modules whose outputs are on a grid, and its number.
        left_out: convolutions that must stay as they are, and why.
    """

    convs: dict[str, _ConvSite]
    activations: dict[str, int]
    left_out: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, batch: torch.Tensor) -> ConvStructure:
        """The structure of a network that was never rounded.

        Args:
            model: in evaluation mode.
            batch: what it can be called with.

        Raises:
            InputError: torch cannot follow the network, or it has no convolution in two dimensions.
        """
        try:
            with torch.no_grad():
                program = torch.export.export(model, (batch,), strict=False)
        except Exception as error:
            raise InputError(
                "The network's convolutions cannot be found.",
                where=type(model).__name__,
                observed=f"torch.export does not get through it ({type(error).__name__})",
            ) from error
        found = _Walk(model, program).structure()
        if not found.convs:
            raise InputError(
                "The network has no convolution that could be rounded.",
                where=type(model).__name__,
                observed=found.left_out or "no convolution",
                expected="nn.Conv2d, each called once",
            )
        return found


class _Walk:
    """One reading of an exported program.

    Args:
        model: its modules are what names stand for.
        program: of it.
    """

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model = model
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.parameters = program.graph_signature.inputs_to_parameters
        self.parents: dict[fx.Node, fx.Node] = {}
        self.calls = Counter(id(m) for m in map(self._module, self.nodes) if m is not None)
        for node in self.nodes:
            if _operator(node) in _CARRIERS:
                for other in node.all_input_nodes:
                    self.parents[self._root(other)] = self._root(node)

    def structure(self) -> ConvStructure:
        """What there is."""
        convs, left_out = self._convs()
        numbers: dict[fx.Node, int] = {}
        for node in convs.values():
            numbers.setdefault(self._root(_argument(node, 0)), len(numbers))
        activations = {
            self._path(node): numbers[self._root(node)]
            for node in self.nodes
            if self._root(node) in numbers and self._is_activation(node)
        }
        norms = {name: self._norm_of(node) for name, node in convs.items()}
        makers = {norms[name] or node: name for name, node in convs.items()}
        makers |= {node: self._path(node) for node in self.nodes if self._path(node) in activations}
        sites = {}
        for name, node in convs.items():
            read, norm = _argument(node, 0), norms[name]
            kernel = self.model.get_parameter(f"{name}.weight")
            sites[name] = _ConvSite(
                reads=numbers[self._root(read)],
                source=makers.get(read),
                norm=None if norm is None else self._path(norm),
                gives=numbers.get(self._root(norm or node)),
                macs=kernel[0].numel() * node.meta["val"].numel(),
            )
        return ConvStructure(sites, activations, left_out)

    def _convs(self) -> tuple[dict[str, fx.Node], dict[str, str]]:
        """The convolutions that can be rounded, and those that cannot."""
        convs: dict[str, fx.Node] = {}
        left_out: dict[str, str] = {}
        for node in self.nodes:
            if not _operator(node).startswith("conv"):
                continue
            weight = self.parameters.get(_argument(node, 1).name, "")
            name, module = weight.rpartition(".")[0], self._module(node)
            if type(module) is not nn.Conv2d or self.model.get_submodule(name) is not module:
                left_out[name or node.name] = "no nn.Conv2d of its own weight"
            elif module.padding_mode != "zeros":
                left_out[name] = f"padded with {module.padding_mode}"
            elif self.calls[id(module)] != 1:
                left_out[name] = "called more than once"
            else:
                convs[name] = node
        return convs, left_out

    def _norm_of(self, conv: fx.Node) -> fx.Node | None:
        """The batch normalisation that can be folded into a convolution."""
        users = list(conv.users)
        if len(users) != 1 or _argument(users[0], 0) is not conv:
            return None
        module = self._module(users[0])
        known = type(module) is nn.BatchNorm2d and module.running_mean is not None
        return users[0] if known and self.calls[id(module)] == 1 else None

    def _is_activation(self, node: fx.Node) -> bool:
        """Whether a module without parameters, called once, is all there is to a node."""
        module = self._module(node)
        known = type(module).__module__ == _ACTIVATIONS and not list(module.parameters())  # type: ignore[union-attr]
        return known and self.calls[id(module)] == 1

    def _module(self, node: fx.Node) -> nn.Module | None:
        path = self._path(node)
        return self.model.get_submodule(path) if path else None

    def _path(self, node: fx.Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        # A second call of a module is named `stem@1`.
        return str(stack[-1][0]).partition("@")[0] if stack else ""

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.parents and self.parents[node] is not node:
            node = self.parents[node]
        return node


def _operator(node: fx.Node) -> str:
    """`relu` of `aten.relu_.default`."""
    name = getattr(node.target, "_schema", None)
    word = name.name.rpartition("::")[2] if name is not None else node.target.__name__  # type: ignore[union-attr]
    return str(word).rstrip("_")


def _argument(node: fx.Node, place: int) -> Any:
    """An argument that is a tensor; anything else for operators that take none there."""
    return node.args[place] if len(node.args) > place else None
