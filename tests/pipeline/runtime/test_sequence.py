"""An answer by itself: what ends it, what it says meanwhile, and what its drafter hears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.runtime import drafting
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.sequence import Decoding, RunningAnswer
from tests.support.tiny_decoder import byte_tokenizer, shared_export

VOCABULARY = 300


def rows(tokens: Sequence[int]) -> np.ndarray:
    """Logits that are sure of these tokens."""
    logits = np.zeros((len(tokens), VOCABULARY), np.float32)
    logits[np.arange(len(tokens)), tokens] = 9.0
    return logits


class Parrot:
    """Proposes what it was told to."""

    def __init__(self, drafts: list[list[int]]) -> None:
        self.drafted = self.taken = 0
        self.drafts = drafts
        self.heard: list[tuple[list[int], list[int]]] = []

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        self.heard.append((list(drafted), list(chosen)))
        self.taken += drafting.common_length(drafted, chosen)

    def draft(self, most: int) -> list[int]:
        draft = self.drafts.pop(0)[:most]
        self.drafted += len(draft)
        return draft


@pytest.mark.parametrize(
    ("decoding", "max_length", "ending", "ids"),
    [
        (Decoding(3), 100, "length", [10, 11, 12]),
        (Decoding(100), 5, "context", [10, 11, 12, 13]),
        (Decoding(4), 5, "length", [10, 11, 12, 13]),
        (Decoding(100, stop_ids={12}), 100, "stop", [10, 11]),
        (Decoding(0), 100, "length", []),
    ],
)
def test_each_end_has_its_name(
    decoding: Decoding, max_length: int, ending: str, ids: list[int]
) -> None:
    answer = RunningAnswer([1, 2], decoding, max_length)
    coming = iter(range(10, 30))
    while answer.ending is None:
        answer.take(rows([next(coming)]))
    assert (answer.ending, answer.ids) == (ending, ids)


def test_a_stop_text_ends_it_and_what_was_held_back_may_hold_one() -> None:
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    decoding = Decoding(100, stops=("cd",))
    answer = RunningAnswer([1], decoding, 100, tokenizer, emit=pieces.append)
    accepted = answer.take(rows(tokenizer.encode("abcdef")), tokenizer.encode("abcde"))
    assert (answer.ending, answer.text, accepted) == ("stop", "ab", [0, 1, 2])
    assert pieces == ["a", "b"]
    assert tokenizer.decode(answer.ids) == "abcd"


def test_draft_tokens_are_accepted_up_to_the_first_that_is_not_chosen() -> None:
    parrot = Parrot([[11, 12, 99, 14], [], [16, 17, 18]])
    answer = RunningAnswer([1, 2], Decoding(9), 100, drafter=parrot)
    answer.take(rows([10]))
    drafted = answer.draft()
    assert answer.take(rows([11, 12, 13, 14, 15]), drafted) == [0, 1]
    assert answer.ids == [10, 11, 12, 13]
    assert answer.draft() == []
    answer.take(rows([15]))
    assert answer.draft(room=3) == [16, 17]
    assert parrot.heard == [
        ([], [1, 2, 10]),
        ([11, 12, 99, 14], [11, 12, 13]),
        ([], [15]),
    ]


def test_the_drafter_hears_of_the_last_call_too() -> None:
    parrot = Parrot([[11, 12]])
    answer = RunningAnswer([1], Decoding(4), 100, drafter=parrot)
    answer.take(rows([10]))
    assert answer.take(rows([11, 12, 13]), answer.draft()) == [0, 1]
    assert answer.ending == "length"
    assert (parrot.drafted, parrot.taken) == (2, 2)


def test_logits_behind_the_end_are_not_looked_at() -> None:
    class Watched(list[np.ndarray]):
        def __getitem__(self, place: Any) -> Any:
            assert place < 2, "the answer has ended"
            return super().__getitem__(place)

    answer = RunningAnswer([1], Decoding(2), 100)
    answer.take(Watched(rows([10, 11, 12])), [10, 11])
    assert answer.ids == [10, 11]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        RunningAnswer([], Decoding(), 100)


def test_another_drafter_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Parrot] = []

    def make(session: object) -> Parrot:
        made.append(Parrot([[5, 6]] * 40))
        return made[-1]

    monkeypatch.setitem(drafting._DRAFTERS, "parrot", make)
    folder = shared_export("opset24")
    expected = LanguageModel.open(folder).generate("abc", Decoding(30))
    found = LanguageModel.open(folder, drafter="parrot").generate("abc", Decoding(30))
    assert found.text == expected.text
    assert found.drafted_tokens == made[0].drafted > 0


def test_special_tokens_are_part_of_the_ids_and_not_of_the_text() -> None:
    tokenizer = byte_tokenizer()
    answer = RunningAnswer([1], Decoding(3), 100, tokenizer)
    ids = [*tokenizer.encode("a"), int(tokenizer.eos_token_id), *tokenizer.encode("b")]
    answer.take(rows(ids), ids[:2])
    assert (answer.ids, answer.text) == (ids, "ab")
