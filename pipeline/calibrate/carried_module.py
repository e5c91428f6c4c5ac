"""Modules that are run where their model is not: the module without its numbers, and those."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

# Of what every worker can import.
_EVERYWHERE = ("torch.", "transformers.", "pipeline.")
# A module without numbers is smaller: else it holds some that are neither parameters nor buffers.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class ModuleCode:
    """A module without its numbers: its classes and settings, some kilobytes.

    Attributes:
        name: of the module in its model; "" for all of it.
        pickled: the module; its parameters and buffers are on the meta device.
    """

    name: str
    pickled: bytes

    @classmethod
    def of(cls, model: nn.Module, name: str = "") -> ModuleCode | None:
        """Of a module as it is now; None where not every worker can make it, or on a GPU."""
        module = model.get_submodule(name)
        numbers = [*module.parameters(), *module.buffers()]
        on_cpu = all(tensor.device.type == "cpu" for tensor in numbers)
        if not on_cpu or not all(map(_is_everywhere, module.modules())):
            return None
        try:
            pickled = pickle.dumps(copy.deepcopy(module, {id(t): _without(t) for t in numbers}))
        except (pickle.PicklingError, AttributeError, TypeError):
            # What was defined while the program ran, such as a forward that was exchanged.
            return None
        return cls(name, pickled) if len(pickled) <= _MOST_BYTES else None

    def model(self) -> nn.Module:
        """A module that has this one, without numbers, by its name."""
        return _model(self.name, self.pickled)

    def call(self, numbers: dict[str, torch.Tensor], *arguments: Any, **keywords: Any) -> Any:
        """What the module returns with these parameters and buffers."""
        module = self.model().get_submodule(self.name)
        return functional_call(module, numbers, arguments, keywords)


def numbers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, by name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _is_everywhere(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_EVERYWHERE)


def _without(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty


# A model, and one that it is held against.
@functools.lru_cache(maxsize=2)
def _model(name: str, pickled: bytes) -> nn.Module:
    made: nn.Module = pickle.loads(pickled)
    if not name:
        return made
    *path, last = name.split(".")
    root = holder = nn.Module()
    for part in path:
        holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder.add_module(last, made)
    return root
