"""How each rival's own published functions are driven, on a machine without a GPU.

Nothing of theirs is here: their modules are imported from a clone that the user made, and what is
replaced is environment alone: "cuda" means the CPU, a command line is empty, packages that only
their data loading or plotting needs may be absent.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pipeline.compress.factorize.factors import Form
from pipeline.compress.plan.plan import (
    GroupPlan,
    RankPlan,
    uniform_plan,
)
from pipeline.errors import InputError
from pipeline.model.structure import Layer

_Ranks = Callable[[str, int, int], int]
# Swift-SVD's names of a Llama layer's matrices.
_SWIFT_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Theirs alone, for data sets and plots that this comparison never touches.
_UNUSED_PACKAGES = ("accelerate", "datasets", "matplotlib", "sklearn")


@dataclass(frozen=True)
class Trial:
    """One model that a rival's code made.

    Attributes:
        name: what was run.
        model: the compressed model, float32.
        plan: the same form and ranks in our terms.
        seconds: calibration and factors.
        ours: what our counterpart is called; None when we have none.
    """

    name: str
    model: PreTrainedModel
    plan: RankPlan
    seconds: float
    ours: str | None


@dataclass(frozen=True)
class _Rival:
    """A public repository and how its code is run.

    Attributes:
        repository: its address.
        module: file, relative to the clone, by which the clone is recognised.
        run: (clone, model, layers, calibration tokens, kept fraction) -> trials.
    """

    repository: str
    module: str
    run: Callable[[Path, PreTrainedModel, list[Layer], torch.Tensor, float], Iterator[Trial]]


class _OnCpu(TorchFunctionMode):
    """While active, a tensor sent to or made on "cuda" stays on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        named = {key: _cpu_for_cuda(value) for key, value in (kwargs or {}).items()}
        return function(*(_cpu_for_cuda(value) for value in args), **named)


def _cpu_for_cuda(value: Any) -> Any:
    is_device = isinstance(value, (str, torch.device))
    return "cpu" if is_device and str(value).startswith("cuda") else value


@contextlib.contextmanager
def _their_world(code: Path) -> Iterator[None]:
    """Import path, devices and output for running a rival's code.

    Their prints go to stderr: stdout is for the result.
    """
    missing = [name for name in _UNUSED_PACKAGES if importlib.util.find_spec(name) is None]
    with (
        contextlib.redirect_stdout(sys.stderr),
        patch.dict(sys.modules, {name: MagicMock() for name in missing}),
        patch.object(sys, "path", [str(code), *sys.path]),
        patch.object(os, "system", lambda command: 0),  # one of them clears the terminal
        _OnCpu(),
    ):
        yield


def _import_script(name: str, arguments: list[str] | None = None) -> Any:
    """A rival's script as a module; `arguments` for one that parses them when imported."""
    precision = torch.get_float32_matmul_precision()
    with patch.object(sys, "argv", [name, *(arguments or [])]):
        module = importlib.import_module(name)
    # One of them asks for TF32 when imported; both sides shall multiply in full float32.
    torch.set_float32_matmul_precision(precision)
    return module


def commit_of(code: Path, rival: _Rival) -> str:
    """The commit of a clone, marked when files in it were changed.

    Raises:
        InputError: not a clone of the rival's repository.
    """
    command = ["git", "-C", str(code), "describe", "--always", "--dirty", "--abbrev=40"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0 or not (code / rival.module).is_file():
        raise InputError(
            "The rival's code is not there.",
            where=code,
            observed=answer.stderr.strip() or f"no {rival.module}",
            expected=f"a git clone of {rival.repository}",
            change=f"git clone {rival.repository} FOLDER, and pass --code FOLDER",
        )
    return answer.stdout.strip()


def _plan_with_ranks(layers: list[Layer], form: Form, ranks: _Ranks) -> RankPlan:
    """Every matrix on its own, at the rank that `ranks` (name, m, n) says."""
    planned = {}
    for layer in layers:
        planned[layer.name] = tuple(
            GroupPlan.at_rank((member,), rows, n, form, ranks(member, rows, n))
            for group, n in ((group, group.in_features) for group in layer.groups)
            for member, rows in zip(group.members, group.out_features, strict=True)
        )
    return RankPlan(planned)


def _looked_up(ranks: dict[str, int]) -> _Ranks:
    return lambda member, m, n: ranks[member]


def _run_swift_svd(
    code: Path, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, keep: float
) -> Iterator[Trial]:
    """Swift-SVD, uniform: by its own rank rule, then at our ranks."""
    started = time.perf_counter()
    with _their_world(code), torch.no_grad():
        bases = _swift_bases(model, layers, tokens)
    calibrated = time.perf_counter() - started
    paths = ["--local_model_path", "", "--svd_file", "", "--compression_ratio", str(keep)]
    with _their_world(code):
        rule = _import_script("uniform_rank_allocation", paths)
        theirs = rule.uniform_allocation(bases, keep, model.config)
    shape = uniform_plan(layers, keep, cat=False, skip=False)
    ours = {group.members[0]: group.rank for group in shape.groups}
    ourselves = [
        {f"{key}_rank": ours[f"{layer.name}.{name}"] for key, name in _SWIFT_NAMES.items()}
        for layer in layers
    ]
    for label, allocation in (("at its own ranks", theirs), ("at our ranks", ourselves)):
        started = time.perf_counter()
        with _their_world(code), torch.no_grad():
            apply = _import_script("update_svd_weights_end").apply_full_svd_redemption
            done = apply(copy.deepcopy(model), bases, keep, allocation)
        seconds = calibrated + time.perf_counter() - started
        ranks = {
            f"{layer.name}.{name}": chosen[f"{key}_rank"]
            for layer, chosen in zip(layers, allocation, strict=True)
            for key, name in _SWIFT_NAMES.items()
        }
        plan = _plan_with_ranks(layers, "low_rank", _looked_up(ranks))
        yield Trial(f"Swift-SVD {label}", done, plan, seconds, f"whitened SVD {label}")


def _swift_bases(
    model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor
) -> list[dict[str, Any]]:
    """Their output bases of every matrix, over windows fed one at a time as they do."""
    accumulator = _import_script("utils.svd").IncrementalSVD
    required = ["--data_root", "", "--model_name", "", "--data_name", ""]
    get_hook = _import_script("train_svd", required).get_hook
    bases: list[dict[str, Any]] = []
    hooks = []
    for index, layer in enumerate(layers):
        bases.append({})
        for key, name in _SWIFT_NAMES.items():
            linear = model.get_submodule(f"{layer.name}.{name}")
            bases[index][key] = accumulator(dim=linear.out_features, name=f"{key}_{index}")
            hooks.append(linear.register_forward_hook(get_hook(index, key, bases)))
    for window in tokens:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for basis in (basis for layer in bases for basis in layer.values()):
        basis.finalize()
    return bases


def _run_svd_llm(
    code: Path, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, keep: float
) -> Iterator[Trial]:
    """SVD-LLM (W): its whitening and truncation.

    Its attention knows no grouped queries, so its factors are multiplied out into a model of
    transformers' own: the same function, without its forward pass.
    """
    started = time.perf_counter()
    compressed = copy.deepcopy(model)
    compressed.config.use_cache = False
    with _their_world(code), torch.no_grad():
        script = _import_script("SVDLLM")
        batches = [{"input_ids": window[None]} for window in tokens]
        profile = script.profle_svdllm("llama", compressed, batches, "cpu")
        script.whitening("llama", compressed, profile, keep, "cpu")
    seconds = time.perf_counter() - started
    done = copy.deepcopy(model)
    ranks: dict[str, int] = {}
    for layer in layers:
        for member in (member for group in layer.groups for member in group.members):
            up, down = (compressed.get_submodule(_svd_llm_name(member, s)).weight for s in "uv")
            ranks[member] = up.shape[1]
            done.get_submodule(member).weight.data = up.data @ down.data
    plan = _plan_with_ranks(layers, "low_rank", _looked_up(ranks))
    yield Trial("SVD-LLM (W)", done, plan, seconds, "whitened SVD at its ranks")


def _svd_llm_name(member: str, side: str) -> str:
    return f"{member.removesuffix('_proj')}_{side}_proj"


def _run_pifa(
    code: Path, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, keep: float
) -> Iterator[Trial]:
    """MPIFA's code: whitened SVD stored by pivot rows, then the same with its M step."""
    arguments = Namespace(
        model="llama",
        DEV="cpu",
        prune="svd-llm",
        use_pifa=True,
        owl=False,
        overall_ratio=keep,
        attn_ratio=keep,
        old_output_factor=0.25,
        reconstruct_step=2,
    )
    loader = [(window[None],) for window in tokens]
    started = time.perf_counter()
    with _their_world(code), torch.no_grad():
        script = _import_script("PIFA")
        script.dataloader = loader  # a global of its main program
        script.dev = torch.device("cpu")
        profile = script.profle_svdllm_low_resource(_with_length(model, tokens), loader, arguments)
    profiled = time.perf_counter() - started
    started = time.perf_counter()
    with _their_world(code), torch.no_grad():
        plain = _pifa_without_m(script, model, layers, profile, arguments)
        plan = _pifa_plan(script, plain, layers)
        _store_by_pivots_(script, plain)
    seconds = profiled + time.perf_counter() - started
    yield Trial("whitened SVD + PIFA", plain, plan, seconds, "whitened SVD + Skip at its ranks")
    del plain
    started = time.perf_counter()
    with _their_world(code), torch.no_grad():
        fitted = _with_length(model, tokens)
        script.reconstruct(fitted, loader, profile, arguments)
        _store_by_pivots_(script, fitted)
    seconds = profiled + time.perf_counter() - started
    yield Trial("MPIFA (M + PIFA)", fitted, plan, seconds, None)


def _with_length(model: PreTrainedModel, tokens: torch.Tensor) -> PreTrainedModel:
    """A copy that carries the window length where their code looks for it."""
    replica = copy.deepcopy(model)
    replica.seqlen = tokens.shape[1]
    return replica


def _pifa_without_m(
    script: Any, model: PreTrainedModel, layers: list[Layer], profile: Any, arguments: Namespace
) -> PreTrainedModel:
    """Their starting point, which their reconstruction would go on from."""
    done = copy.deepcopy(model)
    for index, layer in enumerate(layers):
        for member in (member for group in layer.groups for member in group.members):
            name = member.removeprefix(f"{layer.name}.")
            start = script.local_update(
                done.get_submodule(member),
                profile[index][name],
                arguments.attn_ratio,
                name,
                arguments,
            )
            done.set_submodule(member, script.SVDLinear(start.truc_u, start.truc_v))
    return done


def _pifa_plan(script: Any, model: PreTrainedModel, layers: list[Layer]) -> RankPlan:
    def rank(member: str, rows: int, columns: int) -> int:
        return model.get_submodule(member).truncation_rank

    return _plan_with_ranks(layers, "skip", rank)


def _store_by_pivots_(script: Any, model: PreTrainedModel) -> None:
    """Their lossless storage, at the exact rank.

    Their main program rounds the rank up to a multiple of 16, for a GPU's tiles, and to float16.
    """
    pivots = importlib.import_module("utils.linear_pivot").PivotLinear
    for name, module in list(model.named_modules()):
        if isinstance(module, script.SVDLinear):
            weight = module.ALinear.weight @ module.BLinear.weight
            rank = module.truncation_rank
            model.set_submodule(name, pivots.from_linear(weight.detach(), None, rank))


def product_of(module: nn.Module, columns: int) -> torch.Tensor:
    """The matrix [m, n] that a linear module without bias stands for, however it is stored."""
    with torch.inference_mode():
        return module(torch.eye(columns)).T


RIVALS = {
    "swift-svd": _Rival(
        "https://github.com/hiahei/Swift-SVD", "update_svd_weights_end.py", _run_swift_svd
    ),
    "svd-llm": _Rival("https://github.com/AIoT-MLSys-Lab/SVD-LLM", "SVDLLM.py", _run_svd_llm),
    "pifa": _Rival(
        "https://github.com/biomedical-cybernetics/pivoting-factorization", "PIFA.py", _run_pifa
    ),
}
