"""A model's chat template, rendered in jinja2's sandbox with what transformers offers templates."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

_NAMES = ("chat_template.jinja", "chat_template.json")


class ChatTemplate:
    """A compiled template.

    Raises:
        InputError: the template is not valid jinja2.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError("The chat template is broken.", observed=error) from error

    def render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, special: dict[str, str]
    ) -> str:
        """The conversation as one text.

        Args:
            messages: `role` and `content` each.
            add_generation_prompt: end with what opens the model's answer.
            special: the special tokens that templates may name, such as `bos_token`.

        Raises:
            InputError: the template refuses the conversation, and why.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **special
            )
        except TemplateError as error:
            raise InputError(
                "The chat template refuses this conversation.", observed=error
            ) from error


def find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template of a folder: a file of its own, or part of tokenizer_config.json.

    Of several named templates it is the one called "default".
    """
    for name in _NAMES:
        path = folder / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            return text if path.suffix == ".jinja" else json.loads(text)["chat_template"]
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """jinja2's own filter escapes for HTML, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
