"""The tokenizer of a folder: prompts in, stop ids out.

`tokenizer.json` and the chat template are all that answering needs, and the two small libraries
behind them load in a tenth of a second; transformers takes three. It is asked only where a folder
leaves something to it: no tokenizer.json, or special tokens that it adds by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import InputError, is_panic
from pipeline.json_file import json_field, read_json_object, restated
from pipeline.model.task import require_decoder
from pipeline.model.tokenizer_file import following_tokenizer
from pipeline.runtime.chat_template import (
    Message,
    chat_template,
    checked_messages,
    find_template,
    require_text,
)
from pipeline.runtime.tokenizer_limits import (
    as_value_error,
    failing,
    limited_ids,
    require_bounded,
)
from pipeline.tokenizer_files import require_small_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# Settings by which transformers changes what tokenizer.json says.
_ADDING = ("add_bos_token", "add_eos_token")


class TextTokenizer(Protocol):
    """What answering needs of a tokenizer; transformers' have it, and `FolderTokenizer`."""

    name_or_path: Any
    chat_template: Any
    eos_token_id: Any
    special_tokens_map: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        ...

    def apply_chat_template(
        self, messages: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        """A conversation in the model's own format."""
        ...


class _LimitedTokenizer(ABC):
    """A tokenizer of somebody else: its failures are refusals, and it has a time limit."""

    _tokenizer: Any
    name_or_path: Any
    chat_template: Any
    eos_token_id: Any
    special_tokens_map: Any

    @abstractmethod
    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text, by the library."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return limited_ids(lambda: self._ids(text, add_special_tokens), text, self.name_or_path)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        try:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            raise failing(error, self.name_or_path) from error
        return text

    def apply_chat_template(
        self, messages: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert not tokenize, "callers encode the text themselves"
        return _rendered(self, messages, add_generation_prompt)


class _FolderTokenizer(_LimitedTokenizer):
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
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            require_bounded(self._tokenizer)
        except BaseException as error:  # the library raises nothing narrower, and panics
            raise as_value_error(error) from error
        self.backend_tokenizer = self._tokenizer  # by the name that it has in transformers
        self.is_shareable = True  # several threads may use it at once
        self.name_or_path = str(folder)
        try:
            self.special_tokens_map = _special_tokens(folder, settings)
        except ValueError as error:
            raise _not_loading(folder / "tokenizer_config.json", error) from error
        eos = self.special_tokens_map.get("eos_token")
        self.eos_token_id = None if eos is None else self._tokenizer.token_to_id(eos)
        self.chat_template = find_template(folder, settings)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of one text, since `encode` keeps the interpreter to itself.
        found = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        listed: list[int] = found[0].ids
        return listed


class _WholeTokenizer(_LimitedTokenizer):
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.name_or_path = tokenizer.name_or_path
        self.chat_template = tokenizer.chat_template
        self.eos_token_id = tokenizer.eos_token_id
        self.special_tokens_map = tokenizer.special_tokens_map
        self.backend_tokenizer = getattr(tokenizer, "backend_tokenizer", None)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer files of an exported or a checkpoint folder, with transformers if needed.

    Raises:
        InputError: there are none, or they do not load.
    """
    settings = _settings(folder)
    if not (folder / "tokenizer.json").is_file() or any(settings.get(n) for n in _ADDING):
        return _WholeTokenizer(load_whole_tokenizer(folder))
    try:
        return _FolderTokenizer(folder, settings)
    except (ValueError, KeyError) as error:
        raise _not_loading(folder, error) from error


def load_whole_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the same through transformers, for callers that need all that its tokenizers can do.

    Raises:
        InputError: there are none, or they do not load.
    """
    _settings(folder)
    try:
        return following_tokenizer(
            str(folder), folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever a file brings about in it
        raise _not_loading(folder, error) from error
    except BaseException as error:
        raise (_not_loading(folder, error) if is_panic(error) else error) from error


def _settings(folder: Path) -> dict[str, Any]:
    """Content of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    require_small_tokenizer(folder)
    if not path.is_file():
        require_decoder(folder)
        raise InputError(
            "The folder has no tokenizer.",
            where=folder,
            expected="tokenizer.json and tokenizer_config.json",
            change="give a folder that `skipcat export` or `skipcat compress` wrote",
        )
    try:
        return read_json_object(path)
    except InputError as error:
        raise restated(error, "The tokenizer does not load.", folder) from error


def _not_loading(folder: Path, error: BaseException) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            "The tokenizer comes with Python code of its own, which is not run unasked.",
            where=folder,
            observed="auto_map in tokenizer_config.json",
            change="read the code; if you trust it, load it in transformers and save it as "
            "tokenizer.json",
        )
    return InputError("The tokenizer does not load.", where=folder, observed=error)


def _special_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name, as `special_tokens_map` of transformers has them."""
    named = settings
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and legacy.is_file():
        named = settings | read_json_object(legacy)
    found = {name: _token(named.get(name)) for name in _SPECIAL}
    for name, value in named.items():
        is_token = isinstance(value, str) or (isinstance(value, dict) and "__type" in value)
        if name.endswith("_token") and is_token and name not in found:
            found[name] = _token(value)
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(named.get(group), dict):
            found |= {name: _token(value) for name, value in named[group].items()}
    return {name: token for name, token in found.items() if token is not None}


def _token(value: Any) -> str | None:
    """The text of a special token: a string, or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(content, str):
        raise ValueError(f"a special token is neither a text nor an object: {value!r}"[:200])
    return content


def chat_prompt_ids(
    tokenizer: TextTokenizer, messages: list[Message], raw: bool = False
) -> list[int]:
    """Ids of a conversation in the model's own chat format, up to where the answer begins.

    Args:
        tokenizer: of the model.
        messages: `role` and `content` each; contents are texts, or parts of type text.
        raw: take the last message's text as it is, and no chat format.

    Raises:
        InputError: the messages are none; the tokenizer has no chat template, or the template
            refuses the conversation; or the tokenizer fails on it.
    """
    conversation = checked_messages(messages)
    if raw:
        return tokenizer.encode(conversation[-1]["content"])
    text = _rendered(tokenizer, conversation, True)
    return tokenizer.encode(text, add_special_tokens=False)


def _rendered(tokenizer: TextTokenizer, messages: list[Message], opened: bool) -> str:
    """A conversation in the model's chat template, which runs in a process of its own.

    Raises:
        InputError: there is none, or it refuses the conversation.
    """
    source = _template_source(tokenizer)
    if not source:
        raise InputError(
            "This model has no chat template.",
            where=tokenizer.name_or_path,
            change="pass --raw to give it the prompt as it is",
        )
    text = chat_template(source).render(messages, opened, tokenizer.special_tokens_map)
    require_text(text, "what the chat template made")
    return text


def start_template(tokenizer: TextTokenizer) -> None:
    """Begin to compile the chat template, beside whatever comes next; nothing where there is none.

    For a program that is about to answer a conversation.
    """
    source = _template_source(tokenizer)
    if source:
        chat_template(source).start()


def _template_source(tokenizer: TextTokenizer) -> str | None:
    """The template of a tokenizer; of several named ones, as transformers has them, the default."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    return source


def stop_token_ids(tokenizer: TextTokenizer, folder: Path) -> frozenset[int]:
    """Ids that end an answer, as transformers finds them.

    They are those of generation_config.json, else those of config.json, else the tokenizer's.

    Raises:
        InputError: a file is broken, or its ids are no ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        fields = read_json_object(path) if path.is_file() else {}
        text = json_field(fields, "text_config", dict, path, default=None) or {}
        for level in (fields, text):
            ids = _ids_of(level.get("eos_token_id"), path)
            if ids:
                return ids
    return _ids_of(tokenizer.eos_token_id, folder)


def _ids_of(listed: Any, where: Path) -> frozenset[int]:
    """One id, several, or none."""
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if any(type(token) is not int or token < 0 for token in ids):
        raise InputError(
            "The field 'eos_token_id' is wrong.",
            where=where,
            observed=listed,
            expected="a token id, or a list of them",
        )
    return frozenset(ids)
