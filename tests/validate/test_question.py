"""The question that every stage answers: in the model's own format, up to where an answer ends."""

from __future__ import annotations

from dataclasses import replace

from pipeline.model.load import LoadedModel
from pipeline.model.source import Source
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import byte_tokenizer, tiny_llama
from validate.greedy import trace_greedy
from validate.question import Question, question_for

DOCUMENT = "Question: What is a whale?\nAnswer:"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def asked(template: str | None, longest: int = 200) -> tuple[Question | None, list[str]]:
    """What a tiny model with a chat template is asked, and what was said of it."""
    tokenizer, said = byte_tokenizer(), list[str]()
    tokenizer.chat_template = template
    loaded = LoadedModel(tiny_llama(), tokenizer, Source("tiny", "folder", "tiny"))
    return question_for(loaded, longest, said.append), said


def test_it_is_asked_in_the_format_that_the_model_was_taught() -> None:
    question, said = asked(TEMPLATE)
    assert question is not None
    assert question.text == "What is a whale?"
    text = question.tokenizer.decode(question.ids.tolist())
    assert text == "<user>What is a whale?<assistant>"
    assert not said


def test_a_model_without_a_chat_is_given_a_document_to_continue() -> None:
    question, said = asked(None)
    assert question is not None
    assert question.text == DOCUMENT
    assert question.tokenizer.decode(question.ids.tolist()) == DOCUMENT
    assert not said


def test_a_format_that_refuses_is_named_and_the_question_asked_as_a_document() -> None:
    question, said = asked("{{ raise_exception('no users here') }}")
    assert question is not None
    assert question.text == DOCUMENT
    assert len(said) == 1
    assert "no users here" in said[0]


def test_a_question_that_does_not_fit_is_not_asked() -> None:
    assert asked(None, len(DOCUMENT))[0] is None
    question, _ = asked(None, len(DOCUMENT) + 1)
    assert question is not None
    assert question.tokens == 1


def test_an_answer_ends_where_the_model_says_so() -> None:
    session = TorchSession(tiny_llama())
    question, _ = asked(None)
    assert question is not None
    trace = trace_greedy(session, question.ids[None], question.tokens, {})[0].tokens
    for place in (0, 2):
        cut = replace(question, stop_ids=frozenset({trace[place]}))
        expected = question.tokenizer.decode(trace[: trace.index(trace[place])])
        assert cut.answer(session) == " ".join(expected.split())


def test_every_id_that_the_model_lists_ends_an_answer() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.generation_config.eos_token_id = [3, 5]
    loaded = LoadedModel(model, tokenizer, Source("tiny", "folder", "tiny"))
    question = question_for(loaded, 200, print)
    assert question is not None
    assert question.stop_ids == {3, 5}
