"""A tiny random Llama with a tokenizer, as a folder and as an ONNX export of either profile.

The export here is a short one of its own, so that the tests of the runtime and of the ledger do not
depend on `pipeline.export`; it keeps to the same contract.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipeline.artefact import sha256_of_file

VOCAB_SIZE = 272
MAX_LENGTH = 160
LAYERS = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random model, float32, with four heads of which two share a key; logits far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that most characters outside ASCII need several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tiny_folder(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer as an ordinary Hugging Face folder."""
    tiny_llama(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class GraphCache:
    """The part of a transformers cache that Llama calls, over tensors that are graph inputs."""

    is_compileable = False

    def __init__(self, past: list[torch.Tensor], slots: torch.Tensor, profile: str) -> None:
        self.tensors, self.slots, self.profile = list(past), slots, profile

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for i, new in ((2 * layer_idx, key), (2 * layer_idx + 1, value)):
            self.tensors[i] = self._write(self.tensors[i], new)
        return self.tensors[2 * layer_idx], self.tensors[2 * layer_idx + 1]

    def _write(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.profile == "compat":
            return torch.cat([past, new], dim=2)
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, self.slots[:, 0]),
            {"axis": -2},
            dtype=past.dtype,
            shape=past.shape,
            version=24,
        )

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.tensors[0].shape[2]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        length = self.tensors[0].shape[2]
        return (length + query_length if self.profile == "compat" else length), 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * LAYERS


class GraphStep(nn.Module):
    """One call of the exported graph."""

    slots: torch.Tensor  # of the call being traced; `causal_mask` is called without them

    def __init__(self, model: PreTrainedModel, profile: str) -> None:
        super().__init__()
        self.model, self.profile = model, profile

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = GraphCache(past, position_ids, self.profile)
        GraphStep.slots = position_ids
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, cache.tensors


def causal_mask(kv_length: Any, dtype: torch.dtype = torch.float32, **_: Any) -> torch.Tensor:
    """Float [B, 1, S, kv_length]: a token sees the slots up to its own."""
    allowed = torch.arange(kv_length)[None, None, None, :] <= GraphStep.slots[:, None, :, None]
    return torch.where(allowed, torch.zeros((), dtype=dtype), torch.full((), -6e4, dtype=dtype))


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Grouped attention out of primitives."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = torch.softmax((query @ key.transpose(2, 3)) * scaling + mask, -1)
    return (weights @ value).transpose(1, 2), None


@functools.cache
def shared_export(profile: str) -> Path:
    """The export of `tiny_llama()`, made once for all tests; not to be written to."""
    root = tempfile.mkdtemp(prefix="skipcat-tests-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return export_tiny(tiny_llama(), Path(root) / profile, profile)


def export_tiny(model: PreTrainedModel, folder: Path, profile: str) -> Path:
    """Write `model.onnx`, `model.onnx.data`, `export.json` and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    AttentionInterface.register("tiny_export", plain_attention)
    AttentionMaskInterface.register("tiny_export", causal_mask)
    original_attention = model.config._attn_implementation
    model.config._attn_implementation = "tiny_export"
    try:
        program = trace(model, profile)
    finally:
        model.config._attn_implementation = original_attention
    onnx.save(
        program.model_proto,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=256,
    )
    byte_tokenizer().save_pretrained(folder)
    write_record(folder, profile)
    return folder


def trace(model: PreTrainedModel, profile: str) -> Any:
    """Export at the opset of the profile, with the axes of the contract."""
    rows, new, old = 2, 3, 5
    length = old if profile == "compat" else MAX_LENGTH
    past = [torch.zeros(rows, 2, length, 8) for _ in range(2 * LAYERS)]
    past_axes = (
        {0: "batch_size", 2: "past_sequence_length"} if profile == "compat" else {0: "batch_size"}
    )
    tokens = {0: "batch_size", 1: "sequence_length"}
    names = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    with torch.no_grad():
        return torch.onnx.export(
            GraphStep(model, profile).eval(),
            (
                torch.zeros(rows, new, dtype=torch.int64),
                torch.ones(rows, old + new, dtype=torch.int64),
                torch.arange(old, old + new).expand(rows, -1).contiguous(),
                past,
            ),
            dynamo=True,
            opset_version=18 if profile == "compat" else 24,
            dynamic_shapes={
                "input_ids": tokens,
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": tokens,
                "past": [past_axes] * len(past),
            },
            input_names=["input_ids", "attention_mask", "position_ids"]
            + [f"past_key_values.{name}" for name in names],
            output_names=["logits"] + [f"present.{name}" for name in names],
            verify=False,
            report=False,
            verbose=False,
        )


def write_record(folder: Path, profile: str, **changes: Any) -> None:
    """Write `export.json` for the `model.onnx` of the folder."""
    record = {
        "schema": 1,
        "profile": profile,
        "dtype": "float32",
        "max_length": MAX_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "num_layers": LAYERS,
        "onnx_sha256": sha256_of_file(folder / "model.onnx"),
    }
    (folder / "export.json").write_text(json.dumps(record | changes), encoding="utf-8")
