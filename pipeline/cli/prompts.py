"""Many prompts from one file, for `skipcat run --prompts`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.runtime.sequence import Decoding

_Messages = list[dict[str, str]]


def read_prompts(path: Path) -> list[_Messages]:
    """The conversations of a file, one a line; blank lines are passed over.

    A `.jsonl` file has an object on each line, with `prompt` or `messages`; in any other a line is
    a prompt.

    Raises:
        InputError: the file is not UTF-8, is empty, or a line is not understood; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("The prompts are not UTF-8 text.", where=path, observed=error) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError("There is no prompt in this file.", where=path, expected="one a line")
    if path.suffix != ".jsonl":
        return [[{"role": "user", "content": line.strip()}] for _, line in numbered]
    return [_read_object(line, f"{path}, line {number}") for number, line in numbered]


def _read_object(line: str, where: str) -> _Messages:
    """The conversation of one JSON object; raise InputError that says `where` for anything else."""
    expected = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            "This is not JSON.", where=where, observed=error, expected=expected
        ) from error
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return [{"role": "user", "content": value["prompt"]}]
    messages = value.get("messages") if isinstance(value, dict) else None
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise InputError("This is no prompt.", where=where, observed=line[:80], expected=expected)
    return [{"role": item["role"], "content": item["content"]} for item in messages]


def _is_message(value: Any) -> bool:
    """Whether a value has a role and a content, both text."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


def answer_all(
    folder: Path,
    conversations: list[_Messages],
    decoding: Decoding,
    raw: bool,
    backend: str,
    threads: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Answer every conversation, `batch_size` at a time, and print the answers in their order.

    Args:
        folder: whatever `skipcat run` takes.
        conversations: each begins with its system message, if any.
        decoding: how; the model's own stop tokens end an answer, too.
        raw: give the last message's text as it is, without the chat template.
        backend: as for `open_session`.
        threads: of ONNX Runtime.
        batch_size: how many sequences decode together.
        as_json: one JSON object a line, instead of text with a heading.

    Raises:
        InputError: as `open_slots` and `generate_batch`.
    """
    from pipeline.runtime.generate import generate_batch
    from pipeline.runtime.sessions.slots import open_slots
    from pipeline.runtime.tokenizer import chat_prompt_ids, load_tokenizer, stop_token_ids

    tokenizer = load_tokenizer(folder)
    prompts = [chat_prompt_ids(tokenizer, messages, raw) for messages in conversations]
    session = open_slots(folder, backend, threads, min(batch_size, len(prompts)))
    own = replace(decoding, stop_ids=stop_token_ids(tokenizer, folder))
    for number, answer in enumerate(generate_batch(session, prompts, own, tokenizer)):
        if as_json:
            record = {"number": number, "text": answer.text}
            counts = {"prompt_tokens": len(answer.prompt_ids), "new_tokens": len(answer.ids)}
            click.echo(json.dumps(record | counts))
        else:
            click.echo(f"--- {number + 1} ---\n{answer.text}")
    click.echo(f"[{session.name}: {len(prompts)} prompts, {batch_size} at a time]", err=True)
