from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.profiles import (
    Limits,
    ShapeProfile,
    decoder_limits,
    image_limits,
)
from pipeline.errors import InputError, UsageError

STATIC: dict[str, tuple[int | None, ...]] = {
    "input_ids": (None, None),
    "attention_mask": (None, None),
    "position_ids": (None, None),
    "past_key_values.0.key": (None, 3, 512, 64),
    "past_key_values.0.value": (None, 3, 512, 40),
}
GROWING = {
    name: (shape[0], shape[1], None, shape[3]) if len(shape) == 4 else shape
    for name, shape in STATIC.items()
}

limits = st.builds(
    lambda batch, prefill, length, decode: decoder_limits(batch, prefill, length, decode)[0],
    st.integers(1, 8),
    st.integers(1, 5000),
    st.integers(1, 4096),
    st.sampled_from(["shared", "separate"]),
)


def test_decode_is_one_token_and_prefill_is_tuned_for_128() -> None:
    decode, prefill = Limits(1, 512, 512, "separate").profiles_of(STATIC)
    assert [decode.shapes["input_ids"].min, decode.shapes["input_ids"].max] == [(1, 1), (1, 1)]
    tokens = prefill.shapes["input_ids"]
    assert (tokens.min, tokens.opt, tokens.max) == ((1, 1), (1, 128), (1, 512))


def test_the_shared_decode_profile_admits_two_tokens_and_is_tuned_for_one() -> None:
    tokens = Limits(1, 512, 512, "shared").profiles_of(STATIC)[0].shapes["input_ids"]
    assert (tokens.min, tokens.opt, tokens.max) == ((1, 1), (1, 1), (1, 2))


def test_each_cache_tensor_keeps_its_own_width() -> None:
    shapes = Limits(2, 512, 512).profiles_of(STATIC)[0].shapes
    assert shapes["past_key_values.0.key"].max == (2, 3, 512, 64)
    assert shapes["past_key_values.0.value"].max == (2, 3, 512, 40)


def test_a_growing_cache_starts_empty_and_may_hold_all_but_the_new_token() -> None:
    for profile in Limits(1, 128, 512).profiles_of(GROWING):
        past = profile.shapes["past_key_values.0.key"]
        assert (past.min[2], past.max[2]) == (0, 511)


def test_one_token_calls_need_one_profile_only() -> None:
    assert [profile.name for profile in Limits(1, 1, 512).profiles_of(STATIC)] == ["decode"]


def test_prefill_is_capped_by_the_cache_and_the_user_is_told() -> None:
    limits, notes = decoder_limits(1, 1024, 512, "shared")
    assert limits.max_prefill == 512
    assert notes == ("--max-prefill lowered from 1024 to 512, the cache length",)
    assert decoder_limits(1, 512, 512, "shared") == (limits, ())


def test_the_decode_form_of_the_flavour_is_taken_unless_another_is_asked_for() -> None:
    assert decoder_limits(1, 8, 8, None, "separate")[0].decode == "separate"
    assert decoder_limits(1, 8, 8, "shared", "separate")[0].decode == "shared"


def test_of_an_image_classifier_only_the_batch_counts_and_a_decode_form_is_refused() -> None:
    assert image_limits(4, 1024, 0, None, "separate") == (Limits(4, 0, 0), ())
    with pytest.raises(UsageError, match="max-batch"):
        image_limits(0, 1024, 0)
    with pytest.raises(UsageError, match="no decode profile"):
        image_limits(4, 1024, 0, "shared")


@pytest.mark.parametrize(("batch", "prefill"), [(0, 8), (1, 0), (-1, 8)])
def test_limits_below_one_are_refused(batch: int, prefill: int) -> None:
    with pytest.raises(UsageError):
        decoder_limits(batch, prefill, 512, "shared")


@given(limits=limits, growing=st.booleans())
def test_every_profile_is_ordered_and_its_ends_fit_together(limits: Limits, growing: bool) -> None:
    inputs = GROWING if growing else {**STATIC, **static_cache(limits.max_length)}
    for profile in limits.profiles_of(inputs):
        for ends in profile.shapes.values():
            assert all(a <= b <= c for a, b, c in zip(ends.min, ends.opt, ends.max, strict=True))
        for end in ("min", "opt", "max"):
            assert_consistent(profile, end, growing, limits.max_length)


@given(limits=limits, growing=st.booleans())
def test_every_call_that_fits_the_cache_has_a_profile(limits: Limits, growing: bool) -> None:
    profiles = limits.profiles_of(GROWING if growing else STATIC)
    longest = max(profile.shapes["input_ids"].max[1] for profile in profiles)
    assert longest == limits.max_prefill
    for profile in profiles:
        assert profile.shapes["attention_mask"].max[1] >= limits.max_length
        assert profile.shapes["input_ids"].min == (1, 1)


def static_cache(length: int) -> dict[str, tuple[int | None, ...]]:
    return {name: (None, 3, length, 64) for name in STATIC if name.startswith("past")}


def assert_consistent(profile: ShapeProfile, end: str, growing: bool, max_length: int) -> None:
    shapes = {name: getattr(ends, end) for name, ends in profile.shapes.items()}
    tokens, total = shapes["input_ids"][1], shapes["attention_mask"][1]
    cache = shapes["past_key_values.0.key"][2]
    assert tokens <= total
    if growing:
        assert total == cache + tokens
    else:
        assert total <= max_length
        assert cache == max_length


def test_a_profile_survives_json() -> None:
    for profile in Limits(4, 512, 512).profiles_of(STATIC):
        assert ShapeProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.mark.parametrize(
    "extra",
    [{"pixel_values": (None, 3, 224, 224)}, {"past_key_values.1.key": (None, None, 512, 64)}],
)
def test_an_input_without_a_rule_is_refused_by_name(
    extra: dict[str, tuple[int | None, ...]],
) -> None:
    with pytest.raises(InputError, match=next(iter(extra))):
        Limits(1, 512, 512).profiles_of({**STATIC, **extra})


def test_a_graph_without_a_cache_is_refused() -> None:
    with pytest.raises(InputError, match="no cache"):
        Limits(1, 512, 512).profiles_of({"input_ids": (None, None)})
