from __future__ import annotations

import pytest

from pipeline.runtime.prefix_cache import SlotTable, _kept_tokens, common_length


def test_a_prompt_gets_the_slot_that_shares_most_with_it() -> None:
    table = SlotTable(3)
    table.tokens = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 9]]
    assert table.take([1, 2, 3, 4, 7], 1) == (1, 4)
    assert table.take([1, 2, 3, 4, 7], 1) == (0, 3)
    assert table.take([5], 1) == (2, 0)
    with pytest.raises(LookupError):
        table.take([5], 1)


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    table = SlotTable(1)
    table.tokens = [[1, 2, 3]]
    assert table.take([1, 2, 3], 1) == (0, 2)


def test_without_a_common_beginning_the_slot_free_for_longest_is_taken() -> None:
    table = SlotTable(2)
    first, second = table.take([1], 1)[0], table.take([1], 1)[0]
    table.release(second)
    table.release(first)
    table.tokens = [[7], [8]]
    assert table.take([1, 2], 1)[0] == second


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_of_a_chunk_of_several_tokens_never_one_alone_is_read(chunk: int) -> None:
    for length in range(1, 30):
        for shared in range(length):
            kept = _kept_tokens(shared, length, chunk)
            read = min(length, (kept // chunk + 1) * chunk) - kept
            assert shared - 1 <= kept <= shared
            assert read > 1 or kept % chunk == 0


def test_nothing_is_shared_when_that_is_not_wanted() -> None:
    table = SlotTable(1)
    table.tokens = [[1, 2, 3]]
    assert table.take([1, 2, 3, 4], 1, reuse=False) == (0, 0)


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)],
)
def test_common_length_counts_the_common_beginning(
    first: list[int], second: list[int], length: int
) -> None:
    assert common_length(first, second) == common_length(second, first) == length


def test_a_prompt_read_in_one_call_keeps_two_tokens_back_and_one_of_its_chunks_as_many() -> None:
    held = [1, 2, 3, 4, 5]
    for length in range(2, 6):
        table = SlotTable(1)
        table.tokens = [held]
        assert table.take(held[:length], chunk=length) == (0, length - 2)
    table = SlotTable(1)
    table.tokens = [held]
    assert table.take(held, chunk=4) == (0, 4)  # its last chunk is one token either way
