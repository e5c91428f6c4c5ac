"""`skipcat run FOLDER`: ask the model something, on this machine's CPU."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.errors import InputError, UsageError
from pipeline.json_file import parse_json
from pipeline.runtime.chat_template import checked_messages, require_text
from pipeline.runtime.sessions.open_session import DEVICES
from pipeline.terminal import aside

if TYPE_CHECKING:
    from pipeline.runtime.generate import Answer
    from pipeline.runtime.language_model import LanguageModel
    from pipeline.runtime.sequence import Decoding, RunningAnswer
    from pipeline.runtime.sessions.session import SlotSession
    from pipeline.runtime.tokenizer import TextTokenizer

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
    help="A prompt a line, or a .jsonl of prompt or messages: answered side by side, in order, "
    "each as -p would.",
)
@options.setting(
    "--batch-size", 8, "Answers of --prompts that decode together.", click.IntRange(1, 256)
)
@click.option(
    "--system", help="System message of the conversation; of --prompts, where a line has none."
)
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
    "checked in one call (profile cpu; not with --prompts).",
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
    for flag, text in (("--prompt", prompt), ("--system", system), *(("--stop", s) for s in stops)):
        require_text(text or "", flag)
    opening = [{"role": "system", "content": system}] if system else []
    if prompts is not None:
        if prompt is not None or device != "cpu":
            raise UsageError("--prompts goes with neither --prompt nor --device cuda.")
        _require_sensible(raw, system, False)
        _answer_all(folder, prompts, opening, decoding, raw, backend, threads, batch_size, as_json)
        return
    if prompt is None and sys.stdin is None:
        raise UsageError("There is no prompt.", change="pass -p, or a prompt on stdin")
    converse = prompt is None and sys.stdin.isatty()
    _require_sensible(raw, system, converse and as_json)
    if prompt is None and not converse:
        prompt = _read_stdin()
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
    aside(f"{model.name}; end with Ctrl-D")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a message then says which byte it is
    messages: _Messages = []
    while True:
        aside("> ", end="")
        line = sys.stdin.readline()
        if not line:
            aside()
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\r\n")})
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
    aside(
        f"[{model.name}: {result.prompt_tokens} + {result.new_tokens} tokens, "
        f"first after {result.first_token_s:.2f} s{rate}]"
    )
    if result.ended == "length":
        aside("[cut at --max-new-tokens]")
    if result.ended == "context":
        aside(f"[the cache of {model.max_length} tokens is full]")


def _read_stdin() -> str:
    """All of stdin.

    Raises:
        InputError: it is not UTF-8.
    """
    binary = getattr(sys.stdin, "buffer", None)  # a test's stdin has none
    return sys.stdin.read() if binary is None else _decode(binary.read(), "stdin")


def _decode(content: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark; raise InputError that says `where`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        observed = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise InputError("The prompt is not UTF-8.", where=where, observed=observed) from error


def _read_prompts(path: Path, lines: list[tuple[int, str]] | None = None) -> list[_Messages]:
    """The conversations of a file, one a line.

    A `.jsonl` file has an object on each line, with `prompt` or `messages`; in any other a line is
    a prompt, blanks at its ends included.

    Args:
        path: of the file.
        lines: of it, if it is read already.

    Raises:
        InputError: the file is not UTF-8, is empty, or a line is not understood; names the line.
    """
    lines = _numbered_lines(path) if lines is None else lines
    if path.suffix != ".jsonl":
        return [[{"role": "user", "content": line}] for _, line in lines]
    return [_read_object(line, f"{path}, line {number}") for number, line in lines]


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    r"""The lines of a file of prompts, from 1 on; blank ones are passed over.

    Only \n and \r\n end a line: a prompt may hold the other characters that Python splits at.
    """
    lines = path.read_bytes().split(b"\n")
    decoded = [
        (number, _decode(line, f"{path}, line {number}").removesuffix("\r"))
        for number, line in enumerate(lines, 1)
    ]
    numbered = [(number, line) for number, line in decoded if line.strip()]
    if not numbered:
        raise InputError("There is no prompt in this file.", where=path, expected="one a line")
    return numbered


def _read_object(line: str, where: str) -> _Messages:
    """The conversation of one JSON object; raise InputError that says `where` for anything else."""
    value = parse_json(line, where)
    if isinstance(value, dict) and isinstance(value.get("prompt"), str):
        return [{"role": "user", "content": value["prompt"]}]
    try:
        return checked_messages(value.get("messages") if isinstance(value, dict) else None)
    except InputError as error:
        raise InputError(
            "This is no prompt.",
            where=where,
            observed=line[:80],
            expected='{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
        ) from error


def _answer_all(
    folder: Path,
    path: Path,
    opening: _Messages,
    decoding: Decoding,
    raw: bool,
    backend: str,
    threads: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Answer every prompt of a file, `batch_size` at a time, and print the answers in their order.

    A prompt that cannot be answered has its reason in its place; the others are answered.

    Args:
        folder: whatever `skipcat run` takes.
        path: of the prompts.
        opening: the system message, if any, of conversations that have none.
        decoding: how; the model's own stop tokens end an answer, too.
        raw: give the last message's text as it is, without the chat template.
        backend: as for `open_session`.
        threads: of ONNX Runtime.
        batch_size: how many sequences decode together.
        as_json: one JSON object a line, instead of text with a heading.

    Raises:
        InputError: as `open_slots`; or, at the end, some prompts were not answered.
    """
    from pipeline.runtime.generate import stream_batch
    from pipeline.runtime.sessions.slots import open_slots
    from pipeline.runtime.tokenizer import load_tokenizer, start_template, stop_token_ids

    lines = _numbered_lines(path)
    conversations = _read_prompts(path, lines)
    tokenizer = load_tokenizer(folder)
    if not raw:
        start_template(tokenizer)
    session = open_slots(folder, backend, threads, min(batch_size, len(lines)))
    prompts = [_ids_or_failure(tokenizer, session, opening, m, raw) for m in conversations]
    fit = [ids for ids in prompts if not isinstance(ids, InputError)]
    own = replace(decoding, stop_ids=stop_token_ids(tokenizer, folder))
    assert isinstance(decoding.seed, int)
    seeds = [decoding.seed] * len(fit)
    answers = stream_batch(session, fit, own, tokenizer, seeds)
    ended: list[str] = []
    for number, (prompt, (line, _)) in enumerate(zip(prompts, lines, strict=True)):
        place = {"schema": 1, "backend": session.name, "number": number, "line": line}
        if isinstance(prompt, InputError):
            _write_failure(prompt, place, path, as_json)
            continue
        answer = next(answers)
        ended.append(str(answer.ending))
        _write_answer(answer, place, as_json)
    aside(f"[{session.name}: {len(prompts)} prompts, {batch_size} at a time]")
    _say_what_was_cut(ended, session.max_length)
    if len(fit) < len(prompts):
        missing = len(prompts) - len(fit)
        raise InputError(f"{missing} of {len(prompts)} prompts were not answered.", where=path)


def _ids_or_failure(
    tokenizer: TextTokenizer,
    session: SlotSession,
    opening: _Messages,
    messages: _Messages,
    raw: bool,
) -> list[int] | InputError:
    """The ids of a prompt, or why it cannot be answered."""
    from pipeline.runtime.tokenizer import chat_prompt_ids

    own = [] if messages[0]["role"] == "system" else opening
    try:
        ids = chat_prompt_ids(tokenizer, own + messages, raw)
    except InputError as error:
        return error
    if not ids:
        return InputError("The prompt is empty.", change="give at least one token")
    if len(ids) > session.max_length:
        return InputError(
            "The prompt is longer than the cache.",
            observed=f"{len(ids)} tokens",
            expected=f"at most {session.max_length}",
            change="use a shorter prompt, or export with a longer --max-length",
        )
    if max(ids) >= session.vocab_size:
        return InputError(
            "A token id lies outside the vocabulary.",
            observed=max(ids),
            expected=f"0 to {session.vocab_size - 1}",
            change="use the tokenizer that belongs to this model",
        )
    return ids


def _write_answer(answer: RunningAnswer, place: dict[str, Any], as_json: bool) -> None:
    """Put an answer on stdout at once."""
    if not as_json:
        _write_text(f"--- {place['number'] + 1} ---\n{answer.text}\n")
        return
    found = {"text": answer.text, "prompt_tokens": len(answer.prompt_ids)}
    found |= {"new_tokens": len(answer.ids), "ended": answer.ending}
    _write_text(json.dumps(place | found) + "\n")


def _write_failure(error: InputError, place: dict[str, Any], path: Path, as_json: bool) -> None:
    """Put the reason where the answer would be, and on stderr with the line."""
    if as_json:
        _write_text(json.dumps(place | {"error": error.what, **error.details}) + "\n")
    else:
        _write_text(f"--- {place['number'] + 1} ---\n")
    aside(f"error: {path}, line {place['line']}: {error}")


def _say_what_was_cut(ended: list[str], max_length: int) -> None:
    """Say on stderr how many answers are not whole."""
    if count := ended.count("length"):
        aside(f"[{count} cut at --max-new-tokens]")
    if count := ended.count("context"):
        aside(f"[the cache of {max_length} tokens was full: {count}]")
