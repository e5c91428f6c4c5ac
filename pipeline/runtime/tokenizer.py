"""The tokenizer of a folder: prompts in, stop ids out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer files of an exported or a checkpoint folder.

    Raises:
        InputError: there are none, or they do not load.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(
            "The folder has no tokenizer.",
            where=folder,
            expected="tokenizer.json and tokenizer_config.json",
            change="give a folder that `skipcat export` or `skipcat compress` wrote",
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, OSError) as error:
        raise InputError("The tokenizer does not load.", where=folder, observed=error) from error


def chat_prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Ids of a conversation in the model's own chat format, up to where the answer begins.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "This model has no chat template.",
            where=tokenizer.name_or_path,
            change="pass --raw to give it the prompt as it is",
        )
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and those of `generation_config.json`."""
    ids = {tokenizer.eos_token_id}
    path = folder / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [listed])
    return frozenset(token for token in ids if token is not None)
