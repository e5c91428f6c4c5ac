"""The process in which a chat template runs: a program out of somebody's folder, within limits.

The parent, `chat_template.py`, writes the template and then conversations, a JSON object a line.
What takes too much of the processor is ended by the kernel, whatever it is in the midst of; what
takes too much memory fails there. On Windows, which has no such limits, the parent looks after it.
It imports nothing of this project, so that it starts in a blink.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MEMORY_BYTES = 512 << 20
# Of JSON, of Python's text, and of what a template makes of it on its way.
_BYTES_PER_CHARACTER = 64
_LONGEST_REASON = 1000


class _Generation(Extension):
    """`{% generation %}`, by which trainers find what an assistant said; here its body alone."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _pass_on(self, context: nodes.EvalContext, caller: Any) -> str:
        text: str = caller()
        return text


class _TemplateDict:
    """`dict` without its attributes."""

    def __call__(self, *arguments: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*arguments, **fields)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _TemplateNamespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*arguments: Any, **fields: Any) -> None:
        self, rest = arguments[0], arguments[1:]  # so that a field may be named "self"
        values = dict(*rest, **fields)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name like {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which no model has seen."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2's sandbox with what transformers offers templates, and no more."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment


def _limit(processor_s: float, wall_s: float, characters: int) -> None:
    """Begin to count: time anew, and memory for so many characters of text; zeros end it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, processor_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has this limit
        import resource

        most = _MEMORY_BYTES + _BYTES_PER_CHARACTER * characters
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _reason(error: Exception) -> str:
    """What a template's failure says, in its own words."""
    if isinstance(error, MemoryError):
        return f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"
    if isinstance(error, TemplateSyntaxError):
        return f"{error.message}, line {error.lineno}"[:_LONGEST_REASON]
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:_LONGEST_REASON]


def _render(template: Any, request: dict[str, Any]) -> dict[str, str]:
    """The text of a conversation; or why there is none."""
    pieces, length = [], 0
    for piece in template.generate(**request["special"], **request["context"]):
        length += len(piece)
        if length > request["most_characters"]:
            return {"refused": f"its text is longer than {request['most_characters']} characters"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def serve() -> None:
    """Compile the template of the first line, and render each conversation that follows."""
    _be_mortal()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    start = json.loads(sys.stdin.readline())
    source, times_s = start["source"], (start["processor_s"], start["wall_s"])
    template, broken = None, ""
    _limit(*times_s, len(source))
    try:
        template = _environment().from_string(source)
    except Exception as error:  # the compiler runs what is constant in a template
        broken = _reason(error)
    _limit(0, 0, len(source))  # waiting takes as long as it takes
    for line in sys.stdin:
        _limit(*times_s, len(source) + len(line))
        try:
            answer = {"broken": broken} if broken else _render(template, json.loads(line))
        except Exception as error:  # somebody else's program: whatever it raises is its own
            answer = {"refused": _reason(error)}
        written = json.dumps(answer)
        _limit(0, 0, len(source))
        answers.write(written + "\n")
        answers.flush()


def _be_mortal() -> None:
    """Leave Ctrl-C to the parent, end by the timers whatever it ignores, and say nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        timers = (signal.SIGPROF, signal.SIGALRM)
        for number in timers:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, timers)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
