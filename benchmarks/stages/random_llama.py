"""A random Llama of any size as a Hugging Face folder, to see how memory grows with the layers.

python -m benchmarks.stages.random_llama FOLDER --layers 8 --hidden 256

A slice of Llama-2-7B: --layers 2 --hidden 4096 --intermediate 11008 --head-width 128 --vocab 32000
--dtype bfloat16. The shape of Llama-3.2-1B: --layers 16 --hidden 2048 --intermediate 8192
--kv-heads 8 --vocab 128256 --tied --dtype bfloat16; of SmolLM2-360M: --layers 32 --hidden 960
--intermediate 2560 --kv-heads 5 --vocab 49152 --tied --dtype bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.command import run
from benchmarks.models import byte_tokenizer


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), required=True)
@click.option("--hidden", type=click.IntRange(min=64), default=256, show_default=True)
@click.option("--intermediate", type=click.IntRange(min=64), help="By default 4 x hidden.")
@click.option("--head-width", type=click.IntRange(min=8), default=64, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1), help="By default as many as heads.")
@click.option("--vocab", type=click.IntRange(min=272), default=272, show_default=True)
@click.option("--tied", is_flag=True, help="Embedding and head share one matrix.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
def command(
    folder: Path,
    layers: int,
    hidden: int,
    intermediate: int | None,
    head_width: int,
    kv_heads: int | None,
    vocab: int,
    tied: bool,
    dtype: str,
) -> None:
    """Write the model and a byte tokenizer; print the bytes of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate or 4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head_width,
        num_key_value_heads=kv_heads or hidden // head_width,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    click.echo(sum(p.numel() * p.element_size() for p in model.parameters()))


if __name__ == "__main__":
    sys.exit(run(command))
