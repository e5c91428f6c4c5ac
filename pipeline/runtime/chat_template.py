"""Chat templates: from a conversation to the one text that a model was trained on.

A template is a program that came with a folder. It runs in a process of its own
(`template_process.py`), which a template of a few bytes can keep busy or fill without anybody else
noticing; that process starts while the model loads, and this one needs no jinja2.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from pipeline.child_process import ChildEndedError, JsonChild
from pipeline.errors import InputError
from pipeline.json_file import json_field, read_json_object, read_text_file
from pipeline.runtime.child_watch import ChildWatch

Message = dict[str, str]
_FILES = ("chat_template.jinja", "chat_template.json")
# Without the site's start-up files, and with nothing of the working directory on the path.
_START = "import sys; sys.path += sys.argv[1:]; import template_process; template_process.serve()"
# Of the processor; and by the clock, for a process that waits, which a template has no business to.
_PROCESSOR_S = 3.0
_WALL_S = 30.0
# Of resident memory, where the process cannot be held to fewer addresses.
_RESIDENT_BYTES = 1 << 30
# A template may say everything several times, but not without end.
_SPARE_CHARACTERS = 1 << 20
_TIMES_LONGER = 4
_REFUSED = "The chat template refuses this conversation."


class _ChatTemplate:
    """One template, and its process: started when first needed, and again after it broke.

    Args:
        source: jinja2, as transformers takes it. Whether it compiles is seen when it is used.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._child: JsonChild | None = None
        self._watch: ChildWatch | None = None

    def start(self) -> None:
        """Begin to compile, beside whatever this process does meanwhile."""
        with self._lock:
            self._running()

    def render(
        self, messages: list[Message], add_generation_prompt: bool, special: dict[str, str]
    ) -> str:
        """The conversation as one text.

        Args:
            messages: `role` and `content` each, and what else the template looks for.
            add_generation_prompt: end with what opens the model's answer.
            special: the special tokens that templates may name, such as `bos_token`.

        Raises:
            InputError: the template is broken, refuses the conversation, or takes too long, too
                much memory or too much text for it; in the template's own words.
        """
        context = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            characters = len(json.dumps(context, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError("The conversation is not JSON.", observed=error) from error
        with self._lock:
            answer = self._ask(
                special={name: text for name, text in special.items() if name not in context},
                context=context,
                most_characters=_SPARE_CHARACTERS + _TIMES_LONGER * characters,
            )
        if "broken" in answer:
            raise InputError("The chat template is broken.", observed=answer["broken"])
        if "refused" in answer:
            raise InputError(_REFUSED, observed=answer["refused"])
        return answer["text"]

    def _ask(self, **request: Any) -> dict[str, str]:
        child = self._running()
        try:
            with self._watch.request() if self._watch else contextlib.nullcontext():
                return child.ask(**request)
        except ChildEndedError as error:
            why = f"it takes more than {self._watch.why}" if self._watch and self._watch.why else ""
            self._forget()
            return {"refused": why or _why_ended(error)}
        except BaseException:  # what the process would answer next, nobody asked for
            self._forget()
            raise

    def _running(self) -> JsonChild:
        """The process; the caller holds the lock."""
        if self._child is None:
            command = [sys.executable, "-I", "-S", "-c", _START, *_library_paths()]
            self._child = JsonChild(command, own_session=True)
            weakref.finalize(self, self._child.close, at_once=True)
            limits = {"processor_s": _PROCESSOR_S, "wall_s": _WALL_S}
            self._child.send({"source": self._source, **limits})
            if not _ends_itself():
                pid, times_s = self._child.pid, (_PROCESSOR_S, _WALL_S)
                self._watch = ChildWatch(pid, *times_s, _RESIDENT_BYTES)
        return self._child

    def _forget(self) -> None:
        if self._child is not None:
            self._child.close(at_once=True)
            self._child = None


def _ends_itself() -> bool:
    """Whether the system holds a process to limits that it set itself; Windows does not."""
    return hasattr(signal, "setitimer") and importlib.util.find_spec("resource") is not None


def _why_ended(error: ChildEndedError) -> str:
    known = {
        "SIGPROF": f"it takes more than {_PROCESSOR_S:g} s of the processor",
        "SIGALRM": f"it takes more than {_WALL_S:g} s",
        "SIGKILL": "its process was killed, perhaps for its memory",
    }
    names = {-number: number.name for number in signal.Signals}
    return known.get(names.get(error.status, ""), f"its process ended with {error}")


@functools.lru_cache(maxsize=4)
def chat_template(source: str) -> _ChatTemplate:
    """The template of a source text; its process is shared by all who use it."""
    return _ChatTemplate(source)


def checked_messages(messages: Any) -> list[Message]:
    """A conversation of which every content is one text, as the server takes it, too.

    Args:
        messages: `role` and `content` each; a content is a text, or parts of type text.

    Raises:
        InputError: it is anything else, or a text holds half of a surrogate pair; says where.
    """
    expected = '[{"role": "user", "content": "..."}, ...]'
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("This is no conversation.", observed=_kind(messages), expected=expected)
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise InputError(
            "This is no message.", where=where, observed=_kind(message), expected="role and content"
        )
    texts = {"role": message.get("role"), "content": message.get("content")}
    if isinstance(texts["content"], list | tuple) and all(map(_is_text_part, texts["content"])):
        texts["content"] = "".join(part["text"] for part in texts["content"])
    for name, text in texts.items():
        require_text(text, f"{where}.{name}")
    return {**message, **texts}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and type(part.get("text")) is str


def require_text(text: Any, where: str | None = None) -> None:
    """See that a value is a text, of whole characters.

    Raises:
        InputError: it is of another type, or holds half of a surrogate pair, which is what Python
            makes of a byte that is no UTF-8.
    """
    if not isinstance(text, str):
        raise InputError("This is no text.", where=where, observed=_kind(text), expected="a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else None
        raise InputError(
            "This is not text that any tokenizer could read.",
            where=where,
            observed=f"{f'byte 0x{byte:02x}' if byte else f'U+{code:04X}'} at {error.start}",
            expected="UTF-8",
        ) from None


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else f"a value of type {type(value).__name__}"


def find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template of a folder: a file of its own, or part of tokenizer_config.json.

    Of several named templates it is the one called "default".

    Raises:
        InputError: the file cannot be read, or holds no template.
    """
    for name in _FILES:
        path = folder / name
        if path.is_file():
            if path.suffix == ".jinja":
                return read_text_file(path)
            return json_field(read_json_object(path), "chat_template", str, path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        known = len(named) == len(template)
        template = named.get("default", {}).get("template") if known else template
    if template is not None and not isinstance(template, str):
        raise InputError(
            "The field 'chat_template' is wrong.",
            where=folder / "tokenizer_config.json",
            expected="a text, or a list of objects with name and template",
        )
    return template


@functools.cache
def _library_paths() -> list[str]:
    """Folders that hold jinja2, what it needs and the process's program; none is imported here."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    places = [Path(spec.origin).parents[1] for spec in specs if spec and spec.origin]
    places.append(Path(__file__).parent)
    return list(dict.fromkeys(map(str, places)))
