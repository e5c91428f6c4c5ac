"""A tiny random Llama with a tokenizer, as a folder and as an ONNX export of either profile."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.artefact import sha256_of_file
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest

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
        head_dim=16,
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


@functools.cache
def shared_export(profile: str) -> Path:
    """The export of `tiny_llama()`, made once for all tests; not to be written to."""
    root = Path(tempfile.mkdtemp(prefix="skipcat-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return export_tiny(save_tiny_folder(root / "model"), root / profile, profile)


def export_tiny(checkpoint: Path, folder: Path, profile: str) -> Path:
    """Export a saved tiny model in float32, with as long a cache as it has positions."""
    export_folder(checkpoint, folder, ExportRequest(profile, "float32", MAX_LENGTH))
    return folder


def write_record(folder: Path, profile: str, **changes: Any) -> None:
    """Write a short `export.json` for the `model.onnx` of the folder."""
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
