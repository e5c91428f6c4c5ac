"""The bodies of requests: which fields there are, what they may hold, and what is refused.

A field that this server does not know is refused when it would change the answer, and accepted when
it holds what it is anyway (`"n": 1`) or only tells about the request (`"user"`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.runtime.sampling import LEAST_TEMPERATURE, MOST_PENALTY, UNIFORM, Sampling
from pipeline.runtime.tokenizer import Message
from pipeline.serve.failure import RequestFailure

# They say something about the request, or only how quickly it is answered.
_IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
    )
)
# What OpenAI's interface does when the field is absent, which is all that this server does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
# Of a message: what an answer of OpenAI's own client holds when it is sent back.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "annotations": ([],)}

Body = TypeVar("Body", bound="Generation")
_Item = TypeVar("_Item")
# The first wrong element is the last that is looked at: a body can hold a million of them.
_List = Annotated[list[_Item], Field(fail_fast=True)]
_Stops = str | _List[str]
_SHOWN_CHARACTERS = 100


class _StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False

    @model_validator(mode="after")
    def _nothing_else(self) -> Self:
        return _without_others(self)


class Generation(BaseModel):
    """What both kinds of request have in common.

    Attributes:
        default_tokens: most tokens of an answer when nothing is said, as in OpenAI's interface;
            None leaves it to the server's limits.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    default_tokens: ClassVar[int | None] = None

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1 / MOST_PENALTY, le=MOST_PENALTY)
    noise: Literal["uniform", "gumbel"] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stops | None = None

    @field_validator("temperature")
    @classmethod
    def _not_almost_zero(cls, value: float | None) -> float | None:
        if value and value < LEAST_TEMPERATURE:
            raise ValueError(f"give 0, or at least {LEAST_TEMPERATURE}")
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = _as_list(value)
        if len(stops) > 4:
            raise ValueError("at most 4 stop strings")
        if not all(0 < len(stop) <= 1000 for stop in stops):
            raise ValueError("a stop string has 1 to 1000 characters")
        return value

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Read a request.

        Raises:
            RequestFailure: 400; not JSON, a field missing or wrong, or one that is not known.
        """
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _explain(error) from error
        request.require_known()
        return request

    def sampling(self) -> Sampling:
        """How tokens are chosen; as in OpenAI's interface, temperature 1 unless it is given."""
        penalty = self.repetition_penalty
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if penalty is None else penalty,
            noise=self.noise or UNIFORM,
        )

    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return tuple(_as_list(self.stop))

    def answers(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    def alternatives(self) -> int | None:
        """Of how many likely tokens log probabilities are wanted; None for none at all."""
        raise NotImplementedError

    def form(self) -> dict[str, Any] | None:
        """The JSON schema that answers have to follow; None for any text."""
        return None

    def wanted_tokens(self) -> int | None:
        """Most tokens of the answer; None when the client leaves it open."""
        return self.max_tokens

    def require_known(self) -> None:
        """Check what the types cannot say.

        Raises:
            RequestFailure: a field that would change the answer and that this server does not
                know, or fields that contradict each other.
        """
        _require_neutral(self.model_extra or {}, _NEUTRAL, "")
        if self.stream_options is not None and not self.stream:
            raise RequestFailure(
                400, 'stream_options needs "stream": true.', param="stream_options"
            )


class _TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str

    @model_validator(mode="after")
    def _nothing_else(self) -> Self:
        return _without_others(self)


class _ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _List[_TextPart]

    def to_message(self) -> Message:
        """As chat templates take it; `developer` is OpenAI's newer name of `system`."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] = Field(alias="schema")

    @model_validator(mode="after")
    def _nothing_else(self) -> Self:
        return _without_others(self)


class _ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _nothing_else(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with the type json_schema, and with no other")
        return _without_others(self)


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[_ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: _ResponseFormat | None = None

    def form(self) -> dict[str, Any] | None:
        """As `Generation.form`."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return {"type": "object"} if wanted.json_schema is None else wanted.json_schema.definition

    def alternatives(self) -> int | None:
        """As `Generation.alternatives`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def wanted_tokens(self) -> int | None:
        """Most tokens of the answer, by either of the two names."""
        return self.max_completion_tokens or self.max_tokens

    def require_known(self) -> None:
        """As `Generation.require_known`, for the messages too."""
        super().require_known()
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestFailure(
                400, "max_tokens and max_completion_tokens differ.", param="max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestFailure(400, 'top_logprobs needs "logprobs": true.', param="top_logprobs")
        for index, message in enumerate(self.messages):
            extra = message.model_extra or {}
            _require_neutral(extra, _NEUTRAL_IN_MESSAGE, f"messages[{index}].")


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    default_tokens: ClassVar[int | None] = 16

    prompt: str | _List[int] | _List[str] | _List[_List[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    def alternatives(self) -> int | None:
        """As `Generation.alternatives`."""
        return self.logprobs

    def one_prompt(self) -> str | list[int]:
        """The prompt, out of a list of one if need be.

        Raises:
            RequestFailure: several prompts, or none.
        """
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return prompt  # type: ignore[return-value] # a list whose first item is an int
        if len(prompt) != 1:
            raise RequestFailure(
                400, f"One prompt at a time; here are {len(prompt)}.", param="prompt"
            )
        return prompt[0]  # type: ignore[return-value] # str or list of int


def _explain(error: ValidationError) -> RequestFailure:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestFailure(400, f"The body is not JSON: {first['msg']}", code="invalid_json")
    path = [str(part) for part in first["loc"]]
    # Behind the field, the path names alternatives of a union: not the client's business.
    name = path[0] if path and path[0] != "messages" else ".".join(path[:3])
    name = name[:_SHOWN_CHARACTERS]
    message = f"{name}: {first['msg']}" if name else first["msg"]
    return RequestFailure(400, message, param=name or None, code="invalid_value")


def _require_neutral(fields: dict[str, Any], neutral: dict[str, tuple[Any, ...]], at: str) -> None:
    """Raise RequestFailure for the first field that would change the answer."""
    for name, value in fields.items():
        if value is None or (not at and name in _IGNORED):
            continue
        if not any(_is_same(value, allowed) for allowed in neutral.get(name, ())):
            shown = f"{at}{name[:_SHOWN_CHARACTERS]}"
            raise RequestFailure(
                400,
                f"This server does not support {shown} with this value; leave it out.",
                param=shown,
                code="unsupported_parameter",
            )


_Model = TypeVar("_Model", bound=BaseModel)


def _without_others(model: _Model) -> _Model:
    """A part of a body, which has no fields but its own."""
    extra = next(iter(model.model_extra or {}), None)
    if extra is not None:
        raise ValueError(f"the field {extra[:_SHOWN_CHARACTERS]} is not known")
    return model


def _is_same(value: Any, allowed: Any) -> bool:
    """Equality that tells True from 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _as_list(value: str | list[str] | None) -> list[str]:
    """A string, several or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value
