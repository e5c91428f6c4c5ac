"""A shrunk twin of a model: the same class and features, few layers, narrow, with random numbers.

What decides the form of the function stays: head width, rotary settings, the kinds of layers,
norms, biases, ties, activations, multipliers. Lengths at which it changes (windows, the original
context) become short enough to be passed in a few tokens. Sizes that only repeat things shrink.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import InputError
from pipeline.model.task import TASKS, Task, task_of_config

_logger = logging.getLogger(__name__)
WINDOW, ORIGINAL_CONTEXT, POSITIONS = 16, 32, 96
_VOCABULARY, _INNER = 96, 64
_FEWEST_LAYERS = 2
# The largest twins: of shrunk settings, and of a model that only loses layers, or nothing.
_MOST_PARAMETERS = 64_000_000
# Names that families have for the same setting; `attribute_map` of a class adds its own.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
_INNERS = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp",
    "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_hidden_size",
)  # fmt: skip
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention_window")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_ORIGINAL = "original_max_position_embeddings"
_ROTARY = ("rope_parameters", "rope_scaling")
# Of a config, what says nothing about the function; of a module, likewise.
NAMES = ("quantization_config", "auto_map", "_name_or_path", "dtype", "transformers_version")
_OWN = ("training", "name_or_path")
# Vectors are moved away from what they are made as: 0 and 1 would hide a forgotten bias or gain.
_SPREAD = 0.3


@dataclass(frozen=True)
class _Twin:
    """A random model that stands for another.

    Attributes:
        model: float32, in evaluation mode, with transformers' own plain attention.
        of: the class that it and the other have.
        is_smallest: whether it is the smallest there is; others depend on more of the config.
    """

    model: PreTrainedModel
    of: str
    is_smallest: bool


def make_twin(
    config: PreTrainedConfig, dtype: torch.dtype, run: Callable[[PreTrainedModel], object]
) -> _Twin:
    """The twin of the model that a config describes, with numbers that `dtype` holds exactly.

    Args:
        config: of a model to export; it is not changed.
        dtype: of the graph to be.
        run: what will be done with the twin; one that it fails on is none.

    Raises:
        InputError: none of a bearable size has all the kinds of layers that the model has.
    """
    task = task_of_config(config)
    wanted = _features(_whole(config))
    reasons = []
    for number, shrunk in enumerate(_candidates(config)):
        try:
            empty = _empty(shrunk, task)
            lost = wanted - _features(empty)
            if lost:
                reasons.append(f"without {min(lost)}")
            elif sum(parameter.numel() for parameter in empty.parameters()) > _MOST_PARAMETERS:
                reasons.append("too large")
            else:
                model = _random(shrunk, task, dtype)
                run(model)
                return _Twin(model, type(empty).__name__, number == 0)
        except Exception as error:  # a setting that the class does not take, in whatever words
            _logger.info("no twin: %s", error)
            reasons.append(type(error).__name__)
    raise InputError(
        "The export cannot prove its graph: no small twin of the model can be made.",
        where=config.model_type,
        observed="; ".join(dict.fromkeys(reasons)),
        expected="a class whose settings are transformers' usual ones",
    )


def twin_facts(config: PreTrainedConfig) -> tuple[list[Any], list[Any]]:
    """What a twin is made of: of the smallest one, and of any.

    Args:
        config: of a model to export; it is not changed.

    Returns:
        Equal for models whose smallest twins are the same; and equal for the same model.
    """
    names = (*NAMES, "architectures")
    features = sorted(_features(_empty(config, task_of_config(config))))
    smallest, whole = (
        {name: value for name, value in one.to_dict().items() if name not in names}
        for one in (_candidates(config)[0], config)
    )
    return [type(config).__name__, features, smallest], [type(config).__name__, whole]


def _candidates(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Ways to shrink, the smallest first; the last ones for settings that are not known here."""
    text = config.get_text_config()
    count = int(_first(text.to_dict(), _LAYERS) or 0)
    kinds = _one_of_each(text.to_dict(), count)
    period = list(range(min(count, 8)))
    few = list(range(min(count, _FEWEST_LAYERS)))
    choices = [(kinds, True), (period, True), (kinds, False), (few, False), (period, False)]
    changed = [_shrunk(config, layers, narrow) for layers, narrow in choices if count]
    return [*changed, _copy(config, {})]


def _one_of_each(fields: dict[str, Any], count: int) -> list[int]:
    """The first layer of each kind that lists with an entry for each layer tell apart."""
    lists = [value for _, value in _layer_lists(fields, count)]
    seen: dict[str, int] = {}
    for number in range(count):
        seen.setdefault(str([values[number] for values in lists]), number)
    chosen = list(seen.values())
    others = [number for number in range(count) if number not in chosen]
    return sorted(chosen + others[: max(0, _FEWEST_LAYERS - len(chosen))])


def _layer_lists(fields: dict[str, Any], count: int) -> list[tuple[str, list[Any]]]:
    return [
        (name, list(value))
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("_id")
    ]


def _shrunk(config: PreTrainedConfig, layers: list[int], narrow: bool) -> PreTrainedConfig:
    """The config with some of the layers, short lengths, and narrow if asked for."""
    fields = config.to_dict()
    text = config.get_text_config()
    if text is config:
        return _copy(config, _changes(fields, layers, narrow))
    nested = {}
    for name, part in fields.items():
        own = getattr(config, name, None)
        if isinstance(own, PreTrainedConfig) and isinstance(part, dict):
            chosen = layers if own is text else [0]
            nested[name] = part | _changes(part, chosen, narrow and own is text)
    return _copy(config, nested)


def _copy(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    fields = config.to_dict() | changes
    return type(config).from_dict({k: v for k, v in fields.items() if k not in NAMES})


def _changes(fields: dict[str, Any], layers: list[int], narrow: bool) -> dict[str, Any]:
    """Settings of a twin, of the plain settings of a model."""
    count = int(_first(fields, _LAYERS) or 0)
    changes: dict[str, Any] = {name: len(layers) for name in _LAYERS if name in fields}
    for name, values in _layer_lists(fields, count):
        changes[name] = [values[number] for number in layers]
    changes |= _short_lengths(fields)
    if not narrow:
        return changes
    changes |= _narrow_heads(fields)
    changes |= {name: _INNER for name in _INNERS if isinstance(fields.get(name), int)}
    changes |= {name: _VOCABULARY for name in ("vocab_size",) if name in fields}
    for name, value in fields.items():
        if name.endswith("_token_id") and value is not None:
            small = isinstance(value, int) and value < _VOCABULARY
            changes[name] = value if small else _VOCABULARY - 1
    return changes


def _narrow_heads(fields: dict[str, Any]) -> dict[str, Any]:
    """Few heads, as wide as they are and shared as they are."""
    heads, hidden = _first(fields, _HEADS), _first(fields, _HIDDEN)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return {}
    shared = _first(fields, _KV_HEADS)
    kv_heads = shared if isinstance(shared, int) else heads
    ratio = heads // kv_heads if heads % kv_heads == 0 else 1
    few_kv = min(kv_heads, 2)
    few = few_kv * (ratio if ratio < 2 else 2 + ratio % 2)
    width = fields.get("head_dim") or hidden // heads
    narrow = few * (
        hidden // heads if hidden == heads * width or not fields.get("head_dim") else 16
    )
    changes: dict[str, Any] = {name: few for name in _HEADS if name in fields}
    changes |= {name: few_kv for name in _KV_HEADS if isinstance(fields.get(name), int)}
    # Another width, as of a projection of the embedding, stays another one.
    return changes | {
        name: narrow if value == hidden else narrow // 2
        for name in _HIDDEN
        if isinstance(value := fields.get(name), int)
    }


def _short_lengths(fields: dict[str, Any]) -> dict[str, Any]:
    """Windows and contexts that a few tokens pass; scaled contexts keep their ratio."""
    changes: dict[str, Any] = {
        name: min(value, WINDOW)
        for name in _WINDOWS
        if isinstance(value := fields.get(name), int) and value > 0
    }
    context = _first(fields, _CONTEXTS)
    originals = [rotary[_ORIGINAL] for rotary in rotary_settings(fields) if rotary.get(_ORIGINAL)]
    if isinstance(fields.get(_ORIGINAL), int):
        originals.append(fields[_ORIGINAL])
        changes[_ORIGINAL] = ORIGINAL_CONTEXT
    positions = POSITIONS
    if originals and isinstance(context, int):
        # Some configs claim an original context beyond their own.
        ratio = max(1.0, context / min(originals))
        positions = math.ceil(ORIGINAL_CONTEXT * ratio)
    for name in _ROTARY:
        if isinstance(fields.get(name), dict):
            changes[name] = _short_original(fields[name])
    return changes | {name: positions for name in _CONTEXTS if isinstance(fields.get(name), int)}


def rotary_settings(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of rotary angles of a config as a dict: one, or one for each kind of layer."""
    found = []
    for name in _ROTARY:
        value = fields.get(name)
        if isinstance(value, dict):
            parts = [part for part in value.values() if isinstance(part, dict)]
            found += parts or [value]
    return found


def _short_original(rotary: dict[str, Any]) -> dict[str, Any]:
    short = {k: _short_original(v) if isinstance(v, dict) else v for k, v in rotary.items()}
    return short | ({_ORIGINAL: ORIGINAL_CONTEXT} if rotary.get(_ORIGINAL) else {})


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model that a config describes.

    Raises:
        InputError: it is none of transformers' own for the task.
    """
    return type(_whole(config))


def _whole(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a config describes, without numbers; InputError where there is none."""
    task = task_of_config(config)
    try:
        return _empty(config, task)
    except Exception as error:  # code of its own, another task, settings at odds
        raise InputError(
            "The model cannot be exported: its class cannot be made of its config.",
            where=config.model_type,
            observed=type(error).__name__,
            expected=f"a class of transformers' own behind {TASKS[task].auto_class}",
            change="run again with -v to see what transformers says",
        ) from error


def _empty(config: PreTrainedConfig, task: Task) -> PreTrainedModel:
    """The model without numbers."""
    auto_class = getattr(transformers, TASKS[task].auto_class)
    with init_empty_weights():
        return auto_class.from_config(config, trust_remote_code=False)


def _features(model: nn.Module) -> set[str]:
    """What modules there are, which tensors and switches they have; not how many, nor how wide."""
    found = set()
    for name, module in model.named_modules():
        switches = sorted(
            f"{key}={value}"
            for key, value in vars(module).items()
            if isinstance(value, bool | str | None) and not key.startswith("_") and key not in _OWN
        )
        tensors = sorted(key for key, tensor in module._parameters.items() if tensor is not None)
        kind = re.sub(r"\d+", "#", name)
        found.add(f"{kind} {type(module).__name__}({', '.join([*tensors, *switches])})")
    return found


def _random(config: PreTrainedConfig, task: Task, dtype: torch.dtype) -> PreTrainedModel:
    """A model of numbers with spread, the same each time; the caller's generator is left alone."""
    auto_class = getattr(transformers, TASKS[task].auto_class)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = auto_class.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
        for parameter in model.parameters():
            _fill_(parameter)
            parameter.copy_(parameter.to(dtype))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":  # of a batch normalisation, made as 0 and 1
                    buffer.normal_(0.0, _SPREAD)
                elif name == "running_var":
                    buffer.uniform_(1 - _SPREAD, 1 + _SPREAD)
    return model.eval()


def _fill_(parameter: torch.Tensor) -> None:
    """Spread a vector, or whatever is made as one number, around it; draw a matrix anew.

    A matrix gives what it is given in about the same size, so that every layer has its say and the
    logits are far from flat.
    """
    if parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all()):
        parameter.add_(_SPREAD * torch.randn_like(parameter))
    else:
        parameter.normal_(0.0, parameter[0].numel() ** -0.5)
