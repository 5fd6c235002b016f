"""Order and packing: pure, complete, balanced."""

import numpy as np
import pytest

from pipeline.data.order import batch_indices, order, refuse_repeats
from pipeline.data.packing import pack, split_by_tokens


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    for epoch in range(3):
        assert sorted(order(101, 7, epoch)) == list(range(101))
    assert not np.array_equal(order(101, 7, 0), order(101, 7, 1))
    assert not np.array_equal(order(101, 7, 0), order(101, 8, 0))
    assert sorted(order(5, -1, 0)) == list(range(5))


def test_the_order_is_the_same_for_ever() -> None:
    assert order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, 25])
def test_batches_continue_across_epochs(batch_size: int) -> None:
    num_rows, steps = 10, 30
    stream = [index for step in range(1, steps + 1) for index in batch_indices(step, batch_size, num_rows, 5)]
    epochs = [stream[start : start + num_rows] for start in range(0, len(stream) - num_rows + 1, num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs), "every row once an epoch, none dropped"
    assert epochs[1] == order(num_rows, 5, 1).tolist()


def test_a_resumed_run_takes_what_it_would_have_taken() -> None:
    whole = [batch_indices(step, 7, 23, 1) for step in range(1, 21)]
    order.cache_clear()
    assert [batch_indices(step, 7, 23, 1) for step in range(12, 21)] == whole[11:]


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        batch_indices(1, 4, 0, 0)


def test_packing_by_hand() -> None:
    # longest first: 7 | 5 | 4 joins 5 (9 of 10) | 3 joins 7 (10) | 2 opens the third
    assert pack([3, 7, 5, 4, 2], 10) == [[0, 1], [2, 3], [4]]
    assert pack([10, 30, 10], 10) == [[1], [0], [2]], "a longer one goes alone"
    assert pack([12, 1], 10) == [[0], [1]]
    assert pack([], 10) == []


def test_packing_keeps_every_sequence_once_and_within_capacity() -> None:
    generator = np.random.default_rng(0)
    for capacity in (64, 100, 257):
        lengths = [int(length) for length in generator.integers(1, 120, size=200)]
        bins = pack(lengths, capacity)
        assert sorted(index for indices in bins for index in indices) == list(range(200))
        assert all(len(b) == 1 or sum(lengths[index] for index in b) <= capacity for b in bins)
        assert bins == pack(lengths, capacity)
        fewest = sum(min(length, capacity) for length in lengths) / capacity
        assert len(bins) <= 11 / 9 * max(fewest, sum(length > capacity / 2 for length in lengths)) + 1


def test_split_by_hand() -> None:
    # 9 -> rank 0; 8 -> rank 1; 3 -> rank 1 (8 < 9); 2 -> rank 0: 11 and 11
    assert split_by_tokens([2, 9, 3, 8], 2) == [[0, 1], [2, 3]]
    assert split_by_tokens([5, 5, 5], 3) == [[0], [1], [2]]
    with pytest.raises(ValueError, match=r"2 sequences .* 3 ranks"):
        split_by_tokens([1, 1], 3)


def test_split_is_complete_balanced_and_gives_every_rank_work() -> None:
    generator = np.random.default_rng(1)
    for num_ranks in (1, 2, 7):
        lengths = [int(length) for length in generator.integers(1, 1000, size=50)]
        ranks = split_by_tokens(lengths, num_ranks)
        assert sorted(index for indices in ranks for index in indices) == list(range(50))
        tokens = [sum(lengths[index] for index in indices) for indices in ranks]
        assert min(tokens) > 0
        assert max(tokens) <= 4 / 3 * max(sum(lengths) / num_ranks, max(lengths))
    assert all(split_by_tokens([1] + [1000] * 3, 4)), "no rank is left empty"


def test_a_step_that_would_take_a_row_twice_is_refused() -> None:
    refuse_repeats("prompts_per_step", 200, 200)
    with pytest.raises(ValueError, match=r"prompts_per_step=201 .* set it to 200 at most"):
        refuse_repeats("prompts_per_step", 201, 200)
