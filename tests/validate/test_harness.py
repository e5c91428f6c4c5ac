from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pipeline.errors import InputError
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import FAMILIES, tiny_model
from tests.support.tiny_decoder import MAX_LENGTH, byte_tokenizer, shared_export, tiny_llama
from validate.harness import SessionLM, _batches_by_prefix, _shared_length

# float32 logits of the same numbers in another order of summation, up to 160 of them added.
NATS = 1e-3
LONG = "abcdefghij" * 20  # 200 tokens, more than MAX_LENGTH
PAIRS = [
    ("Question: what?\nAnswer:", " a"),
    ("Question: what?\nAnswer:", " whale"),
    ("Question: what?\nAnswer:", " b"),  # the same input as " a", since its last token is not fed
    ("Trailing space ", "moves"),
    ("", "nothing before"),
    ("é", "ü many bytes"),
    (LONG, " tail"),
]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


@pytest.fixture(scope="module")
def own() -> SessionLM:
    return SessionLM(TorchSession(tiny_llama()), byte_tokenizer(), stop_ids={257})


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    return HFLM(
        pretrained=tiny_llama(),
        tokenizer=byte_tokenizer(),
        batch_size=2,
        max_length=MAX_LENGTH,
        device="cpu",
    )


def by_hand(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """One forward pass without a cache over all tokens, and the log-softmax summed."""
    tokenizer = byte_tokenizer()
    before, after = tokenizer.encode(context), tokenizer.encode(continuation)
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].double()
    predicting = logits[len(before) - 1 : -1].log_softmax(dim=-1)
    value = predicting.gather(1, torch.tensor(after)[:, None]).sum().item()
    return value, predicting.argmax(dim=-1).tolist() == after


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood_is_the_summed_log_softmax_of_the_continuation(family: str) -> None:
    model = tiny_model(family)
    pairs = [*PAIRS[:3], ("a much longer context than the others have", " x")]
    lm = SessionLM(TorchSession(model), byte_tokenizer(), max_rows=3)
    answers = lm.loglikelihood(requests("loglikelihood", pairs))
    for (value, is_greedy), pair in zip(answers, pairs, strict=True):
        expected, expected_greedy = by_hand(model, *pair)
        assert value == pytest.approx(expected, abs=NATS)
        assert is_greedy == expected_greedy


def test_a_greedy_continuation_is_recognised(own: SessionLM) -> None:
    # ids, since greedy text need not survive decoding and encoding
    session = own.session
    context = [1, 2, 3]
    session.reset()
    best = int(session.forward(np.array([context]))[0, -1].argmax())
    other = (best + 1) % session.vocab_size
    found = own._loglikelihood_tokens([(None, context, [best]), (None, context, [other])])
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_loglikelihood_equals_that_of_hflm(own: SessionLM, theirs: HFLM) -> None:
    before = own.truncated
    answers = own.loglikelihood(requests("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [a for a, _ in answers] == pytest.approx([e for e, _ in expected], abs=NATS)
    assert [a for _, a in answers] == [e for _, e in expected]
    assert own.truncated == before + 1


def test_rolling_loglikelihood_equals_that_of_hflm(own: SessionLM, theirs: HFLM) -> None:
    texts = [("short",), (LONG,), (LONG + LONG + "xyz",)]
    answers = own.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    assert answers == pytest.approx(expected, abs=NATS)


def test_generated_text_equals_that_of_hflm(own: SessionLM, theirs: HFLM) -> None:
    settings: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [("hello", settings), ("Question: why?", settings), (LONG, settings)]
    expected = [
        theirs.generate_until(requests("generate_until", [p]), disable_tqdm=True)[0]
        for p in prompts
    ]
    assert own.generate_until(requests("generate_until", prompts)) == expected


def test_text_ends_before_the_first_stop_string(own: SessionLM) -> None:
    free = own.generate_until(requests("generate_until", [("hello", {"max_gen_toks": 20})]))[0]
    stop = free[4:6]
    settings = {"until": ["never said", stop], "max_gen_toks": 20}
    stopped = own.generate_until(requests("generate_until", [("hello", settings)]))[0]
    assert stopped == free[: free.index(stop)]


@pytest.mark.parametrize("profile", ["opset24", "compat"])
def test_onnx_runtime_scores_as_torch_does(own: SessionLM, profile: str) -> None:
    onnx = SessionLM(OnnxSession(shared_export(profile), threads=1), byte_tokenizer(), {257})
    for name, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [(LONG,)]),
    ):
        asked = requests(name, arguments)
        expected = np.array(getattr(own, name)(asked), dtype=np.float64)
        np.testing.assert_allclose(getattr(onnx, name)(asked), expected, atol=NATS)
    asked = requests("generate_until", [("hello", {"max_gen_toks": 12})])
    assert onnx.generate_until(asked) == own.generate_until(asked)


def test_scores_do_not_depend_on_how_many_rows_run_together(own: SessionLM) -> None:
    alone = SessionLM(own.session, own.tokenizer, max_rows=1)
    expected = alone.loglikelihood(requests("loglikelihood", PAIRS))
    together = SessionLM(own.session, own.tokenizer, max_rows=200)  # chunks of one token
    answers = together.loglikelihood(requests("loglikelihood", PAIRS))
    assert [a for a, _ in answers] == pytest.approx([e for e, _ in expected], abs=NATS)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ("abcd", [(1, 14)]),  # the last token of a choice is not fed
        (["yes", "yet", "no", "n"], [(1, 14), (3, 2)]),  # behind the question: ye, n and nothing
    ],
)
def test_the_choices_of_a_question_share_its_tokens(
    own: SessionLM, monkeypatch: pytest.MonkeyPatch, choices: Sequence[str], expected: list[Any]
) -> None:
    forward, shapes = own.session.forward, []

    def counted(input_ids: np.ndarray) -> np.ndarray:
        shapes.append(input_ids.shape)
        return forward(input_ids)

    monkeypatch.setattr(own.session, "forward", counted)
    own.loglikelihood(requests("loglikelihood", [("Which letters?", x) for x in choices]))
    assert shapes == expected


def test_rows_are_batched_by_what_they_begin_with() -> None:
    rows = [(1, 2, 3, 4), (9, 9), (1, 2, 3, 5, 6), (1, 2, 3), (1, 8, 8, 8), (9, 9, 9)]
    expected = [[(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 5, 6)], [(1, 8, 8, 8)], [(9, 9), (9, 9, 9)]]
    assert _batches_by_prefix(rows, 3) == expected
    assert [len(batch) for batch in _batches_by_prefix(rows, 2)] == [1, 2, 1, 2]


def test_shared_length_is_that_of_the_common_prefix() -> None:
    assert _shared_length([(1, 2, 3), (1, 2), (1, 2, 5)]) == 2
    assert _shared_length([(1, 2, 3), (2, 2, 3)]) == 0
    assert _shared_length([(4, 4)]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "greedy"),
        ({"temperature": 0.7}, "greedy"),
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": MAX_LENGTH}, "no room"),
    ],
)
def test_generation_that_is_not_greedy_or_too_long_is_refused(
    own: SessionLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        own.generate_until(requests("generate_until", [("hello", settings)]))


@pytest.mark.parametrize("continuation", ["", LONG])
def test_a_continuation_without_tokens_or_too_long_is_refused(
    own: SessionLM, continuation: str
) -> None:
    with pytest.raises(InputError, match="cannot be scored"):
        own.loglikelihood(requests("loglikelihood", [("context", continuation)]))


def test_a_tokenizer_without_begin_and_end_is_refused(own: SessionLM) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="begin a text"):
        SessionLM(own.session, tokenizer)


def test_the_tokenizers_own_begin_is_not_doubled(own: SessionLM, theirs: HFLM) -> None:
    for text in ("<s>hello", "hello"):
        assert own.tok_encode(text) == theirs.tok_encode(text)


def test_nothing_asked_is_nothing_answered(own: SessionLM) -> None:
    assert own.loglikelihood([]) == own.loglikelihood_rolling([]) == own.generate_until([]) == []
