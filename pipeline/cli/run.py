"""`skipcat run FOLDER`: ask the model something, on this machine's CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.errors import InputError, UsageError
from pipeline.runtime.sessions.open_session import DEVICES

if TYPE_CHECKING:
    from pipeline.runtime.generate import Answer
    from pipeline.runtime.language_model import LanguageModel
    from pipeline.runtime.sequence import Decoding

_Messages = list[dict[str, str]]
# Messages and where the text goes -> the answer.
_Ask = Callable[[_Messages, Callable[[str], None]], "Answer"]

_sampling_options = options.apply(
    options.setting("--max-new-tokens", 256, "Most tokens of an answer.", options.positive),
    options.setting("--temperature", 0.0, "0 always takes the likeliest token."),
    options.setting("--top-k", 0, "0 keeps all."),
    options.setting("--top-p", 1.0, "1 keeps all."),
    options.setting("--min-p", 0.0, "0 keeps all."),
    options.setting(
        "--repetition-penalty", 1.0, "Above 1, tokens that are there already become less likely."
    ),
    click.option("--stop", "stops", multiple=True, help="Text that ends the answer; repeatable."),
    options.seed,
    heading="Sampling",
)


@click.command("run", cls=options.GroupedCommand)
@options.folder
@click.option("-p", "--prompt", help="What to ask; without it, stdin or a conversation.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A prompt a line, or a .jsonl of prompt or messages: answered side by side, in order.",
)
@options.setting(
    "--batch-size", 8, "Answers of --prompts that decode together.", click.IntRange(1, 256)
)
@click.option("--system", help="System message of the conversation.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without a chat template.")
@options.backend
@options.setting(
    "--device",
    "cpu",
    "Where PyTorch computes a checkpoint: cpu, or cuda in half precision with the block-skip "
    "kernels. Exports run on the CPU, engines on their GPU.",
    click.Choice(DEVICES),
)
@options.threads
@options.setting(
    "--lookup/--no-lookup",
    True,
    "Prompt-lookup (speculative) decoding: several draft tokens out of the conversation are "
    "checked in one call (profile cpu).",
)
@_sampling_options
@options.json_output
def command(
    folder: Path,
    prompt: str | None,
    prompts: Path | None,
    batch_size: int,
    system: str | None,
    raw: bool,
    backend: str,
    device: str,
    threads: int | None,
    lookup: bool,
    max_new_tokens: int,
    stops: tuple[str, ...],
    seed: int,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Ask the model in FOLDER something and stream its answer to stdout.

    FOLDER is an exported ONNX folder, an engine, a compressed checkpoint, or any model folder.
    Without --prompt the prompt is read from stdin; at a terminal it becomes a conversation, of
    which each turn reads only what is new.

    \b
      skipcat run build/onnx -p "What is a whale?"
      skipcat run build/cpu --prompts questions.txt --json > answers.jsonl
      echo "Once upon a time" | skipcat run build/checkpoint --raw
    """  # noqa: D301 - click reads the escape
    import numpy as np

    from pipeline.runtime.drafting import PROMPT_LOOKUP
    from pipeline.runtime.language_model import LanguageModel
    from pipeline.runtime.sampling import Sampling
    from pipeline.runtime.sequence import Decoding

    decoding = Decoding(max_new_tokens, Sampling(**sampling), stops=stops, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    if prompts is not None:
        if prompt is not None or device != "cpu":
            raise UsageError("--prompts goes with neither --prompt nor --device cuda.")
        _require_sensible(raw, system, False)
        conversations = [opening + messages for messages in _read_prompts(prompts)]
        _answer_all(folder, conversations, decoding, raw, backend, threads, batch_size, as_json)
        return
    converse = prompt is None and sys.stdin.isatty()
    _require_sensible(raw, system, converse and as_json)
    if prompt is None and not converse:
        prompt = sys.stdin.read()
    # All answers of a conversation draw from one source.
    decoding = replace(decoding, seed=np.random.default_rng(seed))
    drafter = PROMPT_LOOKUP if lookup else None
    model = LanguageModel.open(folder, backend, threads, device, drafter)

    def ask(messages: _Messages, emit: Callable[[str], None]) -> Answer:
        return model.chat(opening + messages, decoding, emit, raw)

    if prompt is None:
        _hold_conversation(model, ask)
    else:
        _answer_once(model, ask, prompt, as_json)


def _require_sensible(raw: bool, system: str | None, conversation_as_json: bool) -> None:
    """Raise UsageError for flags that contradict each other."""
    if raw and system:
        raise UsageError("--system needs the chat template, which --raw leaves out.")
    if conversation_as_json:
        raise UsageError("--json answers one prompt.", change="pass -p, or a prompt on stdin")


def _answer_once(model: LanguageModel, ask: _Ask, prompt: str, as_json: bool) -> None:
    """Answer one prompt: the text as it comes, or everything as JSON at the end."""
    messages = [{"role": "user", "content": prompt}]
    if as_json:
        result = ask(messages, lambda text: None)
        click.echo(json.dumps({"schema": 1, "backend": model.name, **result.to_json()}))
        return
    result = ask(messages, _write_text)
    click.echo()
    _report(model, result)


def _hold_conversation(model: LanguageModel, ask: _Ask) -> None:
    """Ask and answer until end of input."""
    click.echo(f"{model.name}; end with Ctrl-D", err=True)
    messages: _Messages = []
    while True:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            click.echo(err=True)
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        result = ask(messages, _write_text)
        click.echo()
        messages.append({"role": "assistant", "content": result.text})
        _report(model, result)


def _write_text(text: str) -> None:
    """Put a piece of the answer on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(model: LanguageModel, result: Answer) -> None:
    """Say on stderr how fast it was, and if the answer was cut short."""
    rate = "" if result.tokens_per_s is None else f", {result.tokens_per_s:.1f} tokens/s"
    if result.drafted_tokens:
        rate += f", {result.taken_tokens} of {result.drafted_tokens} draft tokens accepted"
    click.echo(
        f"[{model.name}: {result.prompt_tokens} + {result.new_tokens} tokens, "
        f"first after {result.first_token_s:.2f} s{rate}]",
        err=True,
    )
    if result.ended == "length":
        click.echo("[cut at --max-new-tokens]", err=True)
    if result.ended == "context":
        click.echo(f"[the cache of {model.max_length} tokens is full]", err=True)


def _read_prompts(path: Path) -> list[_Messages]:
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


def _answer_all(
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
