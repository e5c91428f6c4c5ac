"""A random Llama of any depth as a Hugging Face folder, to see how memory grows with the layers.

PYTHONPATH=. python benchmarks/random_llama.py FOLDER --layers 8 --hidden 256
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_decoder import byte_tokenizer


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), required=True)
@click.option("--hidden", type=click.IntRange(min=64), default=256, show_default=True)
def command(folder: Path, layers: int, hidden: int) -> None:
    """Write the model and a byte tokenizer; print the bytes of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    click.echo(sum(p.numel() * p.element_size() for p in model.parameters()))


if __name__ == "__main__":
    command()
