"""Any Session as a model of EleutherAI's lm-evaluation-harness.

Tokenisation, truncation and stopping follow `HFLM`, the harness's own model class, so that a score
from here may stand beside one of `lm-eval run --model hf`. Importing this file imports the harness.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.errors import InputError
from pipeline.progress import track
from pipeline.runtime.generate import generate
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.session import RepeatingSession, Session
from validate.metrics import nll_per_token
from validate.quality import CHUNK_TOKENS

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_MAX_ROWS = 4
_MAX_NEW_TOKENS = 256  # HFLM's own, for tasks that set none
# Settings of a generation task that greedy decoding honours, or that cannot change its answer.
_GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
# Strings as the harness gave them, context ids, continuation ids.
_TokenRequest = tuple[Any, list[int], list[int]]
_Answer = tuple[float, bool]
_Row = tuple[int, ...]


@dataclass
class _Target:
    """Tokens to be predicted on a row of input, and what is known of them so far.

    Attributes:
        first: place in the row whose logits predict the first of them.
        tokens: int64 [K].
        log_likelihood: sum over those seen so far, nats.
        is_greedy: whether each of those seen so far is the likeliest.
    """

    first: int
    tokens: np.ndarray
    log_likelihood: float = 0.0
    is_greedy: bool = True

    def add(self, logits: np.ndarray, start: int) -> None:
        """Take into account the row's logits, float32 [S, V], from place `start` on."""
        low = max(self.first, start)
        high = min(self.first + len(self.tokens), start + len(logits))
        if low >= high:
            return
        own, tokens = logits[low - start : high - start], self.tokens[low - self.first :]
        tokens = tokens[: high - low]
        self.log_likelihood -= float(nll_per_token(own, tokens).sum())
        self.is_greedy &= bool((own.argmax(axis=-1) == tokens).all())


class SessionLM(TemplateLM):
    """A Session with its tokenizer, as the harness wants a model.

    Args:
        session: any backend.
        tokenizer: of the same model.
        stop_ids: ids that end a generated answer.
        max_rows: most rows in one call of the session.

    Attributes:
        truncated: requests so far that lost context because they were longer than the cache.

    Raises:
        InputError: the tokenizer has no token to begin an empty context with.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int] = (),
        max_rows: int = _MAX_ROWS,
    ) -> None:
        super().__init__()
        self.session = session
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.max_rows = max_rows
        self.truncated = 0
        if self.prefix_token_id is None:
            raise InputError(
                "The tokenizer has no token to begin a text with.",
                where=session.name,
                expected="a bos or an eos token in tokenizer_config.json",
            )

    @property
    def max_length(self) -> int:
        """Most tokens that go into the session at once."""
        return self.session.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a string; the tokenizer's special tokens are not added to one that has its own."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        flag = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **flag)["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[_Answer]:
        """For each (context, continuation): log-likelihood, nats, and whether it is greedy."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[_TokenRequest], **_: Any) -> list[_Answer]:
        """Score every request; those with the same input share a row, rows share calls."""
        rows: dict[_Row, list[_Target]] = defaultdict(list)
        targets = []
        for strings, context, continuation in requests:
            _require_scorable(strings, continuation, self.max_length)
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            row = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            target = _Target(len(row) - len(continuation), np.array(continuation, np.int64))
            rows[row].append(target)
            targets.append(target)
        repeats = isinstance(self.session, RepeatingSession)
        batches = (_batches_by_prefix if repeats else _batches_by_length)(rows, self.max_rows)
        for batch in track(batches, "scoring"):
            _score_rows(self.session, [(row, rows[row]) for row in batch])
        return [(target.log_likelihood, target.is_greedy) for target in targets]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood, nats, of each whole text, in windows that predict every token once."""
        windows: list[_TokenRequest] = []
        owners = []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, each up to its first stop string."""
        return [self._generate(*request.args) for request in track(requests, "generating")]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        """The greedy answer to one context."""
        keywords = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        _require_greedy(keywords)
        new_tokens = keywords["max_gen_toks"]
        room = self.max_length - new_tokens
        _require_prompt_room(room, new_tokens, self.max_length, self.session.name)
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(keywords["until"], eos=eos)
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(prompt) > room
        ids: list[int] = []
        text = ""
        decoding = Decoding(new_tokens, stop_ids=self.stop_ids)
        for token in generate(self.session, prompt[-room:], decoding):
            ids.append(token)
            # All of it every time: the characters of a piece depend on those around it.
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if any(stop in text for stop in until if stop):
                break
        return postprocess_generated_text(text, until, None)


def _batches_by_length(rows: Iterable[_Row], max_rows: int) -> list[list[_Row]]:
    """Rows of similar length together, the longest first, where memory would run out at once."""
    ordered = sorted(rows, key=lambda row: (-len(row), row))
    return [ordered[start : start + max_rows] for start in range(0, len(ordered), max_rows)]


def _batches_by_prefix(rows: Iterable[_Row], max_rows: int) -> list[list[_Row]]:
    """Rows together that have at least half of their tokens in common, the longest first."""
    batches: list[list[_Row]] = []
    for row in sorted(rows):
        last = batches[-1] if batches else []
        if 0 < len(last) < max_rows and 2 * _shared_length([last[0], row]) >= len(row):
            last.append(row)
        else:
            batches.append([row])
    return sorted(batches, key=lambda batch: -max(map(len, batch)))


def _shared_length(rows: Sequence[_Row]) -> int:
    """How many ids all rows begin with in common."""
    first, last = min(rows), max(rows)  # in this order, all others lie between
    pairs = zip(first, last, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def _score_rows(session: Session, rows: Sequence[tuple[_Row, list[_Target]]]) -> None:
    """Run rows of ids together on an empty cache, and complete their targets.

    What all rows begin with runs once, if the session can go on from there in several ways.
    Shorter rows are filled up on the right, which no token before the filling can see.
    """
    inputs = _padded([row for row, _ in rows])  # [B, S]
    session.reset()
    shared = 0
    if isinstance(session, RepeatingSession) and len(rows) > 1:
        shared = _shared_length([row for row, _ in rows])
        _feed(session, inputs[:1, :shared], 0, [[t for _, targets in rows for t in targets]])
        session.repeat(len(rows))
    _feed(session, inputs[:, shared:], shared, [targets for _, targets in rows])


def _feed(
    session: Session, inputs: np.ndarray, start: int, targets: Sequence[Sequence[_Target]]
) -> None:
    """Run inputs and let the targets of each row see its logits.

    The inputs go in by chunks, so that no more than CHUNK_TOKENS rows of logits exist at a time.

    Args:
        session: holds the tokens before `start`.
        inputs: int64 [B, S]; S may be 0.
        start: place of the first of them in its row.
        targets: B lists.
    """
    step = max(1, CHUNK_TOKENS // len(inputs))
    for first in range(0, inputs.shape[1], step):
        logits = session.forward(np.ascontiguousarray(inputs[:, first : first + step]))  # [B, s, V]
        for own, watching in zip(logits, targets, strict=True):
            for target in watching:
                target.add(own, start + first)


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids as int64 [B, S], filled up on the right with their own first id."""
    length = max(map(len, rows))
    return np.array([[*row, *[row[0]] * (length - len(row))] for row in rows], np.int64)


def _require_scorable(strings: Any, continuation: list[int], max_length: int) -> None:
    """Raise InputError for a continuation without tokens, or with more than fit."""
    if 0 < len(continuation) <= max_length:
        return
    raise InputError(
        "A continuation cannot be scored.",
        where=f"continuation {strings[1][:60]!r}" if strings else None,
        observed=f"{len(continuation)} tokens",
        expected=f"1 to {max_length}, the context of this model",
        change="leave this task out, or export with a longer --max-length",
    )


def _require_greedy(settings: dict[str, Any]) -> None:
    """Raise InputError for a task that wants anything but greedy decoding."""
    others = sorted(set(settings) - _GREEDY_SETTINGS)
    if not settings["do_sample"] and not others:
        return
    observed = ", ".join(others) if others else f"temperature {settings.get('temperature', 1.0)}"
    raise InputError(
        "This task asks for another way of generating than greedy decoding.",
        observed=observed,
        expected=", ".join(sorted(_GREEDY_SETTINGS)) + ", without sampling",
        change="leave this task out",
    )


def _require_prompt_room(room: int, new_tokens: int, max_length: int, where: str) -> None:
    """Raise InputError when the longest answer leaves no place for a prompt."""
    if room <= 0:
        raise InputError(
            "The answers that this task allows leave no room for its prompts.",
            where=where,
            observed=f"answers of {new_tokens} tokens, a context of {max_length}",
            change="use a model or an export with a longer context",
        )
