"""Trees to micro-batches: what is trained, what predicts it, and that nothing is lost over ranks."""

import numpy as np
import pytest

from pipeline.data.trees import Branch, Tree, micro_batch, scored_tree, shard, shard_indices
from rollout.types import Routes


def tree(prompt: list[int], *answers: list[int]) -> Tree:
    return Tree(prompt, [Branch(answer, {"weights": [float(x) for x in answer]}) for answer in answers])


def test_a_group_by_hand() -> None:
    row = micro_batch([tree([10, 11], [1, 2], [3]), tree([20], [4])])
    assert row.token_ids_T.tolist() == [10, 11, 1, 2, 3, 20, 4]
    assert row.lengths == (2, 2, 1, 1, 1) and row.parents == (-1, 0, 0, -1, 3)
    assert row.target_N.tolist() == [1, 2, 3, 4]
    assert row.source_N.tolist() == [1, 2, 1, 5]  # a branch's first token is predicted by the prompt's last row
    assert row.sequence_N.tolist() == [0, 0, 1, 2]
    assert row.columns["weights"].tolist() == [1, 2, 3, 4]


def test_a_conversation_by_hand() -> None:
    row = micro_batch([Tree([5, 6, 7, 8], root_mask=[0, 0, 1, 1])])
    assert row.target_N.tolist() == [7, 8] and row.source_N.tolist() == [1, 2] and row.num_sequences == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("capacity", [8, 64, 1024])
def test_every_tree_is_in_exactly_one_micro_batch_and_ranks_meet_equally_often(num_ranks: int, capacity: int) -> None:
    rng = np.random.default_rng(0)
    trees = [tree([i], *[[100 * i + j] * int(rng.integers(1, 9)) for j in range(3)]) for i in range(1, 12)]
    ranks = shard(trees, num_ranks=num_ranks, micro_batch_tokens=capacity)
    assert len({len(rows) for rows in ranks}) == 1
    targets = sorted(int(token) for rows in ranks for row in rows for token in row.target_N)
    assert targets == sorted(token for t in trees for branch in t.branches for token in branch.token_ids)
    largest = max(t.num_tokens for t in trees)
    assert all(len(row.token_ids_T) <= max(capacity, largest) for rows in ranks for row in rows)


def test_a_comparison_by_hand() -> None:
    trees = [scored_tree([10, 11], [[1, 2], [3]], [0.5, 0.25]), scored_tree([20], [[4, 5, 6]], [1.0])]
    row = micro_batch(trees)
    assert row.token_ids_T.tolist() == [10, 11, 1, 2, 3, 20, 4, 5, 6]
    assert row.lengths == (2, 2, 1, 1, 3) and row.parents == (-1, 0, 0, -1, 3)
    assert row.source_N.tolist() == [3, 4, 8] and row.target_N.tolist() == [2, 3, 6]  # an answer's own last row
    assert row.sequence_N.tolist() == [0, 0, 1] and row.num_sequences == 2
    assert row.columns["targets"].tolist() == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_dealt_is_what_is_sharded(num_ranks: int) -> None:
    rng = np.random.default_rng(1)
    trees = [scored_tree([i], [[i + 1] * int(rng.integers(1, 9)) for _ in range(3)]) for i in range(9)]
    indices = shard_indices(trees, num_ranks=num_ranks, micro_batch_tokens=40)
    ranks = shard(trees, num_ranks=num_ranks, micro_batch_tokens=40)
    assert sorted(i for rows in indices for row in rows for i in row) == list(range(9))
    for places, rows in zip(indices, ranks, strict=True):
        for members, row in zip(places, rows, strict=False):
            assert row.token_ids_T.tolist() == micro_batch([trees[i] for i in members]).token_ids_T.tolist()
            assert row.num_sequences == len(members) and len(row.source_N) == 3 * len(members)
        assert all(row.num_sequences == 0 for row in rows[len(places) :])


def routes(*tokens: int) -> Routes:
    """Routes [T, 1, 1] of one layer and one expert, named for the token they belong to."""
    return np.array(tokens, np.int16).reshape(-1, 1, 1)


def routed(prompt: list[int], *answers: list[int]) -> Tree:
    """A tree whose tokens go to the expert of their own number, the last of an answer to none that is known."""
    branches = [Branch(answer, experts=routes(*answer[:-1], -1)) for answer in answers]
    return Tree(prompt, branches, root_experts=routes(*prompt))


def test_routes_lie_where_their_tokens_lie() -> None:
    row = micro_batch([routed([10, 11], [1, 2], [3]), routed([20], [4, 5, 6])])
    assert row.experts_TLK is not None and row.experts_TLK.shape == (9, 1, 1)
    assert row.experts_TLK.flatten().tolist() == [10, 11, 1, -1, -1, 20, 4, 5, -1]
    assert micro_batch([tree([1], [2])]).experts_TLK is None
    with pytest.raises(AssertionError, match="routes of some"):
        micro_batch([routed([10], [1]), tree([20], [4])])


def test_a_row_that_only_takes_part_has_a_route_too() -> None:
    trees = [routed([10], [1] * 30), routed([11], [2] * 14), routed([12], [3] * 14)]
    ranks = shard(trees, num_ranks=2, micro_batch_tokens=16)
    silent = [row for rows in ranks for row in rows if not row.num_sequences]
    assert len(silent) == 1
    for row in [row for rows in ranks for row in rows]:
        assert row.experts_TLK is not None and len(row.experts_TLK) == len(row.token_ids_T)
