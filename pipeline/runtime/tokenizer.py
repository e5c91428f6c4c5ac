"""The tokenizer of a folder: prompts in, stop ids out.

`tokenizer.json` and the chat template are all that answering needs, and the two small libraries
behind them load in a tenth of a second; transformers takes three. It is asked only where a folder
leaves something to it: no tokenizer.json, or special tokens that it adds by itself.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import InputError
from pipeline.model.task import require_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
# Settings by which transformers changes what tokenizer.json says.
_ADDING = ("add_bos_token", "add_eos_token")


class TextTokenizer(Protocol):
    """What answering needs of a tokenizer; transformers' have it, and `FolderTokenizer`."""

    name_or_path: Any
    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        ...

    def apply_chat_template(
        self, messages: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        """A conversation in the model's own format."""
        ...


class _FolderTokenizer:
    """tokenizer.json through the tokenizers library, with the folder's chat template.

    Args:
        folder: holds tokenizer.json and tokenizer_config.json.
        settings: content of tokenizer_config.json.

    Raises:
        ValueError: the files do not load.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name_or_path = str(folder)
        self._special = {
            name: token if isinstance(token, str) else token["content"]
            for name in _SPECIAL
            if (token := settings.get(name)) is not None
        }
        eos = self._special.get("eos_token")
        self.eos_token_id = None if eos is None else self._tokenizer.token_to_id(eos)
        self.chat_template = _find_template(folder, settings)
        self._template = _ChatTemplate(self.chat_template) if self.chat_template else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert self._template is not None, "callers look at chat_template first"
        assert not tokenize, "callers encode the text themselves"
        return self._template.render(messages, add_generation_prompt, self._special)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer files of an exported or a checkpoint folder, with transformers if needed.

    Raises:
        InputError: there are none, or they do not load.
    """
    settings = _settings(folder)
    if not (folder / "tokenizer.json").is_file() or any(settings.get(n) for n in _ADDING):
        return load_whole_tokenizer(folder)
    try:
        return _FolderTokenizer(folder, settings)
    except (ValueError, KeyError) as error:
        raise _not_loading(folder, error) from error


def load_whole_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the same through transformers, for callers that need all that its tokenizers can do.

    Raises:
        InputError: there are none, or they do not load.
    """
    from transformers import AutoTokenizer

    _settings(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever a file brings about in it
        raise _not_loading(folder, error) from error
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """Content of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        require_decoder(folder)
        raise InputError(
            "The folder has no tokenizer.",
            where=folder,
            expected="tokenizer.json and tokenizer_config.json",
            change="give a folder that `skipcat export` or `skipcat compress` wrote",
        )
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _not_loading(folder, error) from error
    return settings


def _not_loading(folder: Path, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            "The tokenizer comes with Python code of its own, which is not run unasked.",
            where=folder,
            observed="auto_map in tokenizer_config.json",
            change="read the code; if you trust it, load it in transformers and save it as "
            "tokenizer.json",
        )
    return InputError("The tokenizer does not load.", where=folder, observed=error)


def chat_prompt_ids(
    tokenizer: TextTokenizer, messages: list[Message], raw: bool = False
) -> list[int]:
    """Ids of a conversation in the model's own chat format, up to where the answer begins.

    Args:
        tokenizer: of the model.
        messages: `role` and `content` each.
        raw: take the last message's text as it is, and no chat format.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if raw:
        return tokenizer.encode(messages[-1]["content"])
    if not tokenizer.chat_template:
        raise InputError(
            "This model has no chat template.",
            where=tokenizer.name_or_path,
            change="pass --raw to give it the prompt as it is",
        )
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def stop_token_ids(tokenizer: TextTokenizer, folder: Path) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's and those of `generation_config.json`."""
    ids = {tokenizer.eos_token_id}
    path = folder / "generation_config.json"
    if path.is_file():
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [listed])
    return frozenset(token for token in ids if token is not None)


class _ChatTemplate:
    """A chat template, in jinja2's sandbox with what transformers offers templates.

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


def _find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template of a folder: a file of its own, or part of tokenizer_config.json.

    Of several named templates it is the one called "default".
    """
    for name in _TEMPLATE_FILES:
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
