"""What a GGUF file says of its model that transformers passes over: read here, or refused by name.

transformers passes over every key and tensor that its table of the architecture lacks. Here each of
the architecture's keys is known to be read, is held against the config, or goes into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
from transformers import PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.reader import (
    GgufHeader,
    _read_metadata,
    _read_tensor_table,
    load_gguf_state_dict,
    read_gguf_metadata,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from pipeline.errors import InputError
from pipeline.model.rotary_factors import llama3_of

_FACTORS = "rope_freqs.weight"
_ANYWHERE = (_FACTORS, "output.weight")
# Keys that say nothing of the function, or nothing that the tensors' shapes do not say.
_NEUTRAL = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "tensor_data_layout", "rope.scaling.finetuned", "attention.head_count",
}  # fmt: skip
# Values that ask for nothing, of keys that no config is given.
_ASKING_NOTHING: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,),
    "attention.sliding_window": (0,), "pooling_type": (0,), "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (1.0,),
}  # fmt: skip
# Keys whose value is a field of the config, whichever of these it has.
_FIELDS = {
    "attention.layer_norm_rms_epsilon": (
        "rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon",
    ),
    "attention.layer_norm_epsilon": (
        "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "rms_norm_eps",
    ),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual", "parallel_attn"),
}  # fmt: skip
# How the names of keys end that say how much there is of something, and those that limit no tensor.
_COUNTS = ("_count", "_count_kv", "_count_swa", "_length", "_length_swa", "_size")
_POSITIONS = (
    "context_length", "rope.scaling.original_context_length", "attention.temperature_length",
)  # fmt: skip
_SCALING = ("rope.scaling.", "rope.scale_linear")


def check_gguf(path: Path) -> None:
    """Hold the header of a GGUF file against the file, before anything is made of its numbers.

    Args:
        path: of the file.

    Raises:
        InputError: it ends before its tensors do, or speaks of more than is in them.
        Exception: the header is broken, as the reader says it.
    """
    blob = np.memmap(path, mode="r", dtype=np.uint8)
    metadata, tensors, place = _read_metadata(blob, str(path))
    table, place = _read_tensor_table(blob, tensors, place)
    align = metadata.get("general.alignment", 32)
    sizes = [_stored_bytes(shape, kind) for _, shape, kind, _ in table]
    ends = [offset + size for (*_, offset), size in zip(table, sizes, strict=True)]
    end = -(-place // align) * align + max(ends, default=0)
    if end > len(blob):
        raise _broken("is truncated", path, f"{len(blob)} bytes", f"{end} bytes by its header")
    shapes = [shape for (_, shape, *_), size in zip(table, sizes, strict=True) if size]
    widest = max((side for shape in shapes for side in shape), default=0)
    prefix = f"{metadata['general.architecture']}."
    for name, value in metadata.items():
        key = name.removeprefix(prefix)
        if key == name or key in _POSITIONS or not key.endswith(_COUNTS):
            continue
        most = tensors if key == "block_count" else widest
        said = max((v for v in np.atleast_1d(value).tolist() if isinstance(v, int)), default=0)
        if said > most:
            raise _broken("speaks of more than it holds", path, f"{key} = {said}", f"up to {most}")


def _stored_bytes(shape: tuple[int, ...], kind: int) -> int:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return math.prod(shape) // block * block_bytes


def _broken(how: str, path: Path, observed: str, expected: str) -> InputError:
    return InputError(
        f"The GGUF file {how}.",
        where=path,
        observed=observed,
        expected=expected,
        change="download or copy the file again",
    )


def read_gguf(path: Path, config: Any, model: PreTrainedModel) -> None:
    """Hold a GGUF file against the config that transformers made of it, and complete the config.

    Args:
        path: of the file.
        config: changed in place.
        model: of that config, without numbers.

    Raises:
        InputError: a key or a tensor that changes the function, which the config cannot say.
    """
    metadata, names = read_gguf_metadata(str(path))
    architecture = metadata["general.architecture"]
    if architecture in GGUF_CONFIG_ARCHS:
        return  # transformers' newer reader, which names the tensors that it cannot place
    reading = _Reading(path, architecture, metadata, config)
    reading.compare()
    factors = _factors(path) if _FACTORS in names else None
    reading.take_scaling(factors)
    config.tie_word_embeddings = "output.weight" not in names
    usual = _usual_names(model) if config.model_type == "llama" else set()
    unknown = [name for name in names if name not in usual and name not in _ANYWHERE]
    # transformers asks this for each module apart, which is slow.
    known = _known_tensors(architecture, config, model) if unknown else set()
    for name in unknown:
        if name not in known:
            raise reading.refused(f"tensor {name}")


def _known_tensors(architecture: str, config: Any, model: PreTrainedModel) -> set[str]:
    """The names that the tensors of a model have in GGUF."""
    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=config.to_dict())
    return set(get_gguf_hf_weights_map(model, processor))


def _usual_names(model: PreTrainedModel) -> set[str]:
    """Names in GGUF of the tensors of a Llama."""
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    names = (table.get_name(name, (".weight", ".bias")) for name in model.state_dict())
    return {name for name in names if name is not None}


def _factors(path: Path) -> torch.Tensor:
    """What the frequencies of the rotation are divided by, float64 [head width / 2]."""
    stored = load_gguf_state_dict(GgufHeader.from_file(str(path)))[_FACTORS]
    return stored[...].double()


class _Reading:
    """One file's keys, each looked at once."""

    def __init__(self, path: Path, architecture: str, metadata: dict[str, Any], config: Any):
        self.path, self.config = path, config
        prefix = f"{architecture}."
        self.values = {
            name.removeprefix(prefix): value
            for name, value in metadata.items()
            if name.startswith(prefix)
        }
        table = GGUF_CONFIG_MAPPING.get(config.model_type, {})
        table = table or GGUF_CONFIG_MAPPING.get(architecture, {})
        self.read = {name for name, field in table.items() if field not in (None, -1)}
        self.special: dict[str, Callable[[Any], bool]] = {
            "rope.dimension_count": self._rotated,
            "attention.key_length": self._key_width,
            "attention.value_length": lambda value: bool(value == self.width),
            "rope.freq_base": self._base,
            "rope.freq_base_swa": self._base_of_windows,
            "attention.sliding_window": self._window,
            "attention.sliding_window_pattern": self._pattern,
            "attention.scale": self._scale,
        }

    @property
    def width(self) -> int:
        """Of a head."""
        config = self.config
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    def refused(self, what: str) -> InputError:
        """The refusal of a key or a tensor."""
        return InputError(
            "The GGUF file says something of its model that is not read.",
            where=self.path,
            observed=what,
            expected=f"what transformers reads of {self.config.model_type} files",
            change="start from the model's own safetensors",
        )

    def compare(self) -> None:
        """Look at every key but those of the rotation's scaling."""
        if self.config.model_type == "mistral":
            self.config.sliding_window = None  # not the class's own, unless the file says so
        for name, value in self.values.items():
            if not name.startswith(_SCALING) and not self._holds(name, value):
                raise self.refused(f"{name} = {value}")

    def _holds(self, name: str, value: Any) -> bool:
        """Whether the config says what a key says, now if not before."""
        if isinstance(value, list) and len(set(map(str, value))) == 1 and "pattern" not in name:
            value = value[0]  # the same for every layer
        if value in _ASKING_NOTHING.get(name, ()):
            return True
        if name in _NEUTRAL:
            return not isinstance(value, list)
        if name in self.special:
            return self.special[name](value)
        if name in _FIELDS:
            return self._set(_FIELDS[name], value)
        return name in self.read and not name.startswith("expert")

    def _set(self, fields: tuple[str, ...], value: Any) -> bool:
        """Put a value into the first of the fields that the config has."""
        field = next((field for field in fields if hasattr(self.config, field)), None)
        if field is None or isinstance(value, list):
            return False
        setattr(self.config, field, value)
        return True

    def _key_width(self, value: int) -> bool:
        if value != self.width and hasattr(self.config, "head_dim"):
            self.config.head_dim = value
        return value == self.width

    def _rotated(self, value: int) -> bool:
        """The rotated part of a head."""
        width = self.values.get("attention.key_length", self.width)
        fraction = self._angles().get("partial_rotary_factor")
        if fraction is not None:
            self._angles()["partial_rotary_factor"] = value / width
            return True
        return bool(value == width)

    def _base(self, value: float) -> bool:
        angles = self._angles()
        if "rope_theta" in angles:
            angles["rope_theta"] = value
        return "rope_theta" in angles

    def _base_of_windows(self, value: float) -> bool:
        angles = (getattr(self.config, "rope_parameters", None) or {}).get("sliding_attention")
        if angles is not None:
            angles["rope_theta"] = value
        return angles is not None

    def _window(self, value: int) -> bool:
        """Some classes have the field, and look at it only when another says so."""
        idle = getattr(self.config, "use_sliding_window", None) is False
        return not idle and self._set(("sliding_window",), value)

    def _pattern(self, value: Any) -> bool:
        kinds = getattr(self.config, "layer_types", None) or []
        places = range(len(kinds))
        slides = value if isinstance(value, list) else [bool((i + 1) % value) for i in places]
        return [kind == "sliding_attention" for kind in kinds] == list(map(bool, slides))

    def _scale(self, value: float) -> bool:
        if hasattr(self.config, "query_pre_attn_scalar"):
            self.config.query_pre_attn_scalar = value**-2
            return True
        return math.isclose(value, self.width**-0.5, rel_tol=1e-5)

    def _angles(self) -> dict[str, Any]:
        """The config's entry on rotary angles, of full attention where each kind has its own."""
        angles = getattr(self.config, "rope_parameters", None) or {}
        own: dict[str, Any] = angles.get("full_attention", angles)
        return own

    def take_scaling(self, factors: torch.Tensor | None) -> None:
        """Let the config say how the rotary angles are scaled.

        Args:
            factors: what each frequency is divided by, if the file says so.
        """
        given = {n: v for n, v in self.values.items() if n.startswith(_SCALING)}
        given = {n: v for n, v in given.items() if v not in _ASKING_NOTHING.get(n, ())}
        scaled = self._scaled(given)
        if factors is not None and bool((factors != 1).any()):
            if scaled:
                raise self.refused(f"{_FACTORS} beside rope.scaling")
            known = llama3_of(factors, self._angles().get("rope_theta", 0.0))
            if known is None:
                raise self.refused(f"{_FACTORS}, which are not those of Llama 3")
            scaled = known
        if scaled:
            if "rope_theta" not in self._angles():
                raise self.refused("rope.scaling")
            self._angles().update(scaled)

    def _scaled(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same in the config's words; empty for plain angles."""
        rest = {name.removeprefix("rope.scaling."): value for name, value in given.items()}
        rest.pop("finetuned", None)
        original = rest.pop("original_context_length", None)
        # Without a type llama.cpp takes a factor for a linear one.
        kind, factor = rest.pop("type", "linear"), rest.pop("factor", None)
        factor = rest.pop("rope.scale_linear", factor)
        if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
            scaled: dict[str, Any] = {}
        elif kind == "linear":
            scaled = {"rope_type": "linear", "factor": factor}
        elif kind == "yarn" and factor and original:
            scaled = {"rope_type": "yarn", "factor": factor}
            scaled["original_max_position_embeddings"] = original
            for name in ("beta_fast", "beta_slow"):
                value = rest.pop(f"yarn_{name}", None)
                scaled |= {} if value is None else {name: value}
        else:
            raise self.refused(f"rope.scaling.type = {kind}, factor {factor}, of {original}")
        if rest:
            raise self.refused(", ".join(f"rope.scaling.{n} = {v}" for n, v in rest.items()))
        return scaled
