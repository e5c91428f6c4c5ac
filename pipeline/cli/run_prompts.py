"""What `skipcat run` was told, and its `--prompts`: those of a file, answered side by side."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.json_file import parse_json
from pipeline.runtime.chat_template import checked_messages
from pipeline.terminal import aside

if TYPE_CHECKING:
    from pipeline.runtime.sequence import Decoding, RunningAnswer
    from pipeline.runtime.sessions.session import SlotSession
    from pipeline.runtime.tokenizer import TextTokenizer

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Way:
    """How whatever is asked is answered.

    Attributes:
        folder: whatever `skipcat run` takes.
        opening: the system message, if any, of conversations that have none.
        raw: give the last message's text as it is, without the chat template.
        as_json: JSON instead of text.
        decoding: the model's own stop tokens end an answer, too.
        backend: as for `open_session`.
        device: of a checkpoint.
        threads: of ONNX Runtime.
        lookup: let draft tokens come out of the conversation.
        draft: a folder whose model drafts, or None.
        memory: bytes that a checkpoint may take, or None for all.
        vram: bytes of the GPU that it may take there, or None.
    """

    folder: Path
    opening: Messages
    raw: bool
    as_json: bool
    decoding: Decoding
    backend: str
    device: str
    threads: int | None
    lookup: bool
    draft: Path | None
    memory: str | None
    vram: str | None

    @classmethod
    def of(
        cls,
        folder: Path,
        opening: Messages,
        raw: bool,
        as_json: bool,
        *,
        backend: str,
        device: str,
        threads: int | None,
        lookup: bool,
        draft: Path | None,
        memory: str | None,
        vram: str | None,
        max_new_tokens: int,
        stops: tuple[str, ...],
        seed: int,
        **sampling: Any,
    ) -> Way:
        """The way that the flags say; raise UsageError for numbers out of range."""
        from pipeline.runtime.sampling import Sampling
        from pipeline.runtime.sequence import Decoding

        decoding = Decoding(max_new_tokens, Sampling(**sampling), stops=stops, seed=seed)
        runtime = backend, device, threads
        return cls(folder, opening, raw, as_json, decoding, *runtime, lookup, draft, memory, vram)


def answer_all(way: Way, path: Path, batch_size: int) -> None:
    """Answer every prompt of a file, `batch_size` at a time, and print the answers in their order.

    A prompt that cannot be answered has its reason in its place; the others are answered. As JSON
    each is one object a line, else text with a heading.

    Args:
        way: how.
        path: of the prompts.
        batch_size: how many sequences decode together.

    Raises:
        InputError: as `open_slots`; or, at the end, some prompts were not answered.
    """
    from pipeline.runtime.generate import stream_batch
    from pipeline.runtime.open_answering import open_answering, require_device
    from pipeline.runtime.tokenizer import load_tokenizer, start_template, stop_token_ids

    lines = _numbered_lines(path)
    conversations = _read_prompts(path, lines)
    tokenizer = load_tokenizer(way.folder)
    if not way.raw:
        start_template(tokenizer)
    slots = min(batch_size, len(lines))
    runtime = way.backend, way.threads, slots
    require_device(way.device, way.vram)
    session, drafts = open_answering(
        way.folder, way.draft, *runtime, memory=way.memory, vram=way.vram
    )
    prompts = [_ids_or_failure(tokenizer, session, way, m) for m in conversations]
    fit = [ids for ids in prompts if not isinstance(ids, InputError)]
    own = replace(way.decoding, stop_ids=stop_token_ids(tokenizer, way.folder))
    assert isinstance(way.decoding.seed, int), "that of the command line"
    seeds = [way.decoding.seed] * len(fit)
    answers = stream_batch(session, fit, own, tokenizer, seeds, drafts)
    ended: list[str] = []
    for number, (prompt, (line, _)) in enumerate(zip(prompts, lines, strict=True)):
        place = {"schema": 1, "backend": session.name, "number": number, "line": line}
        if isinstance(prompt, InputError):
            _write_failure(prompt, place, path, way.as_json)
            continue
        answer = next(answers)
        ended.append(str(answer.ending))
        _write_answer(answer, place, way.as_json)
    aside(f"[{session.name}: {len(prompts)} prompts, {batch_size} at a time]")
    _say_what_was_cut(ended, session.max_length)
    say(drafts.take_notice() if drafts else None)
    if len(fit) < len(prompts):
        missing = len(prompts) - len(fit)
        raise InputError(f"{missing} of {len(prompts)} prompts were not answered.", where=path)


def say(notice: str | None) -> None:
    """Put what there is to know, if anything, on stderr."""
    if notice is not None:
        aside(f"[{notice}]")


def _ids_or_failure(
    tokenizer: TextTokenizer, session: SlotSession, way: Way, messages: Messages
) -> list[int] | InputError:
    """The ids of a prompt, or why it cannot be answered."""
    from pipeline.runtime.tokenizer import chat_prompt_ids

    own = [] if messages[0]["role"] == "system" else way.opening
    try:
        ids = chat_prompt_ids(tokenizer, own + messages, way.raw)
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
        write_text(f"--- {place['number'] + 1} ---\n{answer.text}\n")
        return
    found = {"text": answer.text, "prompt_tokens": len(answer.prompt_ids)}
    found |= {"new_tokens": len(answer.ids), "ended": answer.ending}
    write_text(json.dumps(place | found) + "\n")


def _write_failure(error: InputError, place: dict[str, Any], path: Path, as_json: bool) -> None:
    """Put the reason where the answer would be, and on stderr with the line."""
    if as_json:
        write_text(json.dumps(place | {"error": error.what, **error.details}) + "\n")
    else:
        write_text(f"--- {place['number'] + 1} ---\n")
    aside(f"error: {path}, line {place['line']}: {error}")


def _say_what_was_cut(ended: list[str], max_length: int) -> None:
    """Say on stderr how many answers are not whole."""
    if count := ended.count("length"):
        aside(f"[{count} cut at --max-new-tokens]")
    if count := ended.count("context"):
        aside(f"[the cache of {max_length} tokens was full: {count}]")


def _read_prompts(path: Path, lines: list[tuple[int, str]] | None = None) -> list[Messages]:
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
        (number, decode_prompt(line, f"{path}, line {number}").removesuffix("\r"))
        for number, line in enumerate(lines, 1)
    ]
    numbered = [(number, line) for number, line in decoded if line.strip()]
    if not numbered:
        raise InputError("There is no prompt in this file.", where=path, expected="one a line")
    return numbered


def _read_object(line: str, where: str) -> Messages:
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


def decode_prompt(content: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark; raise InputError that says `where`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        observed = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise InputError("The prompt is not UTF-8.", where=where, observed=observed) from error


def write_text(text: str) -> None:
    """Put a piece of the answer on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
