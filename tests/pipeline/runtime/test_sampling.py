from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from pipeline.errors import UsageError
from pipeline.runtime.sampling import (
    GREEDY,
    GUMBEL,
    UNIFORM,
    Sampling,
    _keep_min_p,
    _keep_top_k,
    _keep_top_p,
    _penalise_repetition,
    _softmax,
)

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3]))
NO_HISTORY = np.array([], dtype=np.int64)


def kept(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(scores)).tolist()


def test_softmax_equals_scipys() -> None:
    logits = np.random.default_rng(0).normal(size=50) * 30
    np.testing.assert_allclose(_softmax(logits), scipy.special.softmax(logits), rtol=1e-12)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept(_keep_top_k(LOGITS, 2)) == [1, 3]
    assert kept(_keep_top_k(LOGITS, 0)) == kept(_keep_top_k(LOGITS, 9)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("p", "expected"), [(0.4, [1]), (0.6, [1, 3]), (0.81, [1, 2, 3])])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, expected: list[int]) -> None:
    assert kept(_keep_top_p(LOGITS, p)) == expected


def test_min_p_drops_what_is_far_below_the_likeliest() -> None:
    assert kept(_keep_min_p(LOGITS, 0.5)) == [1, 3]
    assert kept(_keep_min_p(LOGITS, 0.0)) == [0, 1, 2, 3]


def test_every_filter_keeps_the_likeliest() -> None:
    for scores in (_keep_top_k(LOGITS, 1), _keep_top_p(LOGITS, 1e-9), _keep_min_p(LOGITS, 1.0)):
        assert kept(scores) == [1]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign_once() -> None:
    scores = _penalise_repetition(np.array([2.0, -2.0, 1.0]), np.array([0, 0, 1]), 2.0)
    assert scores.tolist() == [1.0, -4.0, 1.0]


def test_temperature_zero_is_argmax_and_draws_nothing() -> None:
    generator = np.random.default_rng(0)
    state = generator.bit_generator.state
    assert GREEDY.choose(LOGITS, NO_HISTORY, generator) == 1
    assert generator.bit_generator.state == state


def test_samples_follow_the_distribution() -> None:
    generator = np.random.default_rng(0)
    how = Sampling(temperature=1.0)
    drawn = [how.choose(LOGITS, NO_HISTORY, generator) for _ in range(4000)]
    frequencies = np.bincount(drawn, minlength=4) / len(drawn)
    # Four standard errors of a frequency of 0.5 over 4000 draws.
    np.testing.assert_allclose(frequencies, np.exp(LOGITS), atol=4 * 0.5 / np.sqrt(4000))


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0}],
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        Sampling(**values)  # type: ignore[arg-type]


def test_two_models_meet_the_same_noise_and_agree_as_often_as_it_promises() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=16)
    other = one + random.normal(size=16)
    distance = np.abs(_softmax(one) - _softmax(other)).sum() / 2
    draws, shares = 3000, {}
    for noise in (UNIFORM, GUMBEL):
        how = Sampling(1.0, noise=noise)
        chosen = [
            [how.choose(scores, NO_HISTORY, np.random.default_rng(n)) for n in range(draws)]
            for scores in (one, other)
        ]
        shares[noise] = np.mean(np.array(chosen[0]) == np.array(chosen[1]))
    # Three standard errors of a share.
    least, slack = (1 - distance) / (1 + distance), 1.5 / np.sqrt(draws)
    assert least - slack < shares[GUMBEL] < 1 - distance + slack
    assert shares[GUMBEL] > shares[UNIFORM]


def test_a_noise_that_is_none_is_refused_and_filters_leave_the_others_noise_alone() -> None:
    with pytest.raises(UsageError, match="noise"):
        Sampling(1.0, noise="pink")
    few, all_of_them = (Sampling(1.0, top_k=k, noise=GUMBEL) for k in (3, 0))
    generators = [np.random.default_rng(4) for _ in range(2)]
    for how, generator in zip((few, all_of_them), generators, strict=True):
        how.choose(LOGITS, NO_HISTORY, generator)
    assert len({generator.random() for generator in generators}) == 1


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])  # of 0, all are equally likely
def test_top_p_is_that_of_a_whole_sort(top_p: float, spread: float) -> None:
    random = np.random.default_rng(0)
    scores = np.round(random.standard_normal(5000) * spread, 1)  # of which many are equal
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores - scores.max())
    cumulative = np.cumsum(weights[order] / weights.sum())
    expected = sorted(order[: int(np.searchsorted(cumulative, top_p)) + 1].tolist())
    assert kept(_keep_top_p(scores, top_p)) == expected
    how = Sampling(temperature=1.0, top_p=top_p)
    chances = np.zeros(5000)
    chances[expected] = weights[expected] / weights[expected].sum()
    for seed in range(5):  # the token is the one that the whole vocabulary would be asked for
        wanted = np.random.default_rng(seed).choice(5000, p=chances)
        assert how.choose(scores, [], np.random.default_rng(seed)) == wanted


@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        Sampling(0.8, top_k=3, repetition_penalty=1.3),
        Sampling(1.2, top_p=0.9, noise=GUMBEL),
        Sampling(0.7, min_p=0.1),
    ],
)
def test_the_first_of_a_rank_is_what_is_chosen_and_the_noise_goes_on_as_then(how: Sampling) -> None:
    random, history = np.random.default_rng(3), [1, 2]
    for seed in range(60):
        logits = random.normal(size=12).astype(np.float32) * 2
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        ranked = how.rank(logits, history, one, 4)
        assert ranked[0][0] == how.choose(logits, history, other)
        assert one.random() == other.random()
        tokens = [token for token, _ in ranked]
        assert len(set(tokens)) == len(tokens) <= 4
        weights = [weight for _, weight in ranked[1:]]
        assert weights == sorted(weights, reverse=True)
        assert all(0 < weight <= 1 for weight in weights)
        again = how.rank(logits, history, np.random.default_rng(seed), 1)
        assert again == [(tokens[0], 1.0)]


@pytest.mark.parametrize("how", [GREEDY, Sampling(1.0), Sampling(1.0, noise=GUMBEL)])
def test_what_another_model_chooses_by_the_same_noise_ranks_high(how: Sampling) -> None:
    random, hits = np.random.default_rng(0), [0, 0, 0]
    for seed in range(600):
        logits = random.normal(size=40) * 2
        other = logits + 0.4 * random.normal(size=40)
        ranked = how.rank(logits, (), np.random.default_rng(seed), 3)
        chosen = how.choose(other, (), np.random.default_rng(seed))
        for place, (token, _) in enumerate(ranked):
            hits[place] += token == chosen
    assert hits[0] > 0.6 * 600
    # Of what the first misses the second alone has more than a third, by chance a thirtieth.
    assert hits[1] > (600 - hits[0]) / 3
    assert hits[1] > hits[2]
