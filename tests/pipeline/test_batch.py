"""Trees to micro-batches: what is trained, what predicts it, and that nothing is lost over ranks."""

from typing import Any

import numpy as np
import pytest

from configs.grpo import GRPOConfig, ObjectiveConfig
from pipeline.data import trees
from pipeline.data.prompts import Prompt
from pipeline.data.trees import Branch, MicroBatch, Tree, cut, micro_batch, scored_tree, shard_indices, stored_tree
from pipeline.grpo.batches import prompt_kl_coef, split_updates, training_batches
from pipeline.grpo.experience import Experience, JudgedGroup
from rewards.types import Task
from rollout.types import Completion, Group, KeptTokens, Routes
from tests.pipeline.sharding import filled, shard, stored
from tests.settings import GRPO


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


def test_fewer_groups_than_ranks_are_cut_for_all_of_them() -> None:
    groups = [Tree([1, 2], [Branch([3] * n) for n in (7, 5, 3, 9)]) for _ in range(2)]
    ranks = shard(groups, num_ranks=8, micro_batch_tokens=64)
    assert all(any(len(row.target_N) for row in rows) for rows in ranks)
    assert sum(len(row.target_N) for rows in ranks for row in rows) == 2 * (7 + 5 + 3 + 9)
    assert sum(row.num_new_tokens for rows in ranks for row in rows) == 2 * (2 + 7 + 5 + 3 + 9)


def test_a_group_longer_than_a_row_is_cut_and_its_prompt_repeated() -> None:
    group = tree([10, 11, 12], [1] * 6, [2] * 2, [3] * 5, [4] * 3)
    parts = cut(group, 12)
    assert [[branch.token_ids[0] for branch in part.branches] for part in parts] == [[1, 4], [2, 3]]
    assert [part.root_repeated for part in parts] == [False, True] and {len(part.root_ids) for part in parts} == {3}
    assert cut(group, 19) == [group]  # it fits
    assert [part.num_tokens for part in cut(group, 4)] == [9, 8, 6, 5]  # a completion is never cut
    comparison = scored_tree([1, 2], [[3] * 5, [4] * 5])
    assert cut(comparison, 8) == [comparison]  # its loss needs both answers
    row = micro_batch([tree([20], [7]), parts[1]])
    assert row.repeated == (2,) and row.num_new_tokens == len(row.token_ids_T) - 3
    columns = [micro_batch([part]).columns["weights"] for part in parts]
    assert sorted(np.concatenate(columns)) == sorted(micro_batch([group]).columns["weights"])


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rows_of_groups_have_at_most_the_tokens_asked_for_and_ranks_balance(num_ranks: int) -> None:
    """A long group beside short ones: uncut, one rank would have 6000 tokens and the others 60."""
    rng = np.random.default_rng(0)
    long = tree([1] * 50, *[[2] * int(n) for n in rng.integers(200, 500, 16)])
    short = [tree([1] * 5, [3] * 20, [4] * 30) for _ in range(num_ranks - 1)]
    ranks = shard([long, *short], num_ranks=num_ranks, micro_batch_tokens=600)
    assert max(len(row.token_ids_T) for rows in ranks for row in rows) <= 600
    tokens = [sum(len(row.target_N) for row in rows) for rows in ranks]
    assert sum(tokens) == sum(len(branch.token_ids) for t in [long, *short] for branch in t.branches)
    assert max(tokens) - min(tokens) <= 550
    new = sum(row.num_new_tokens for rows in ranks for row in rows if row.num_sequences)
    assert new == sum(t.num_tokens for t in [long, *short])


def test_a_prompt_has_the_smallest_beta_of_the_rewards_that_judge_it() -> None:
    objective = ObjectiveConfig(kl_coef=0.04, kl_coef_of={"math": 0.001, "code": 0.02})

    def kl_coef(kind: str) -> float:
        return prompt_kl_coef(objective, Prompt([1], Task("2 + 2", "4", kind=kind)))

    assert [kl_coef(kind) for kind in ("math", "code", "helpful", "code math", "")] == [0.001, 0.02, 0.04, 0.001, 0.001]


def test_a_rollout_of_r1_is_split_at_random_into_sixteen_batches_of_512() -> None:
    updates_PG = split_updates(512, 16, 16, random_seed=(0, 7))
    assert np.bincount(updates_PG.flatten()).tolist() == [512] * 16
    assert len(set(updates_PG[0])) > 8  # a group lies in many updates
    assert (updates_PG == split_updates(512, 16, 16, random_seed=(0, 7))).all()
    assert (updates_PG != split_updates(512, 16, 16, random_seed=(0, 8))).any()


def test_whole_groups_are_split_in_their_order() -> None:
    assert split_updates(4, 3, 2, random_seed=None).tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]


@pytest.mark.parametrize("split", ["prompts", "completions"])
def test_every_completion_is_trained_once_with_the_advantage_of_its_whole_group(split: str) -> None:
    """Rewards 1, 0, 0, 0 have mean 1/4, so advantages 3/4, -1/4, -1/4, -1/4 wherever the completions are trained."""
    config = GRPOConfig.model_validate(
        GRPO | {"group_size": 4, "updates_per_batch": 4, "split": split, "objective": {"normalize_std": False}}
    )
    groups = [
        JudgedGroup(
            Prompt([p], Task("", None)),
            stored(Group(p, [p], [Completion([10 * p + g], [0.0], "", "stop", 0) for g in range(4)])),
            [],
        )
        for p in range(4)
    ]
    experience = Experience(groups, np.array([[1.0, 0, 0, 0]] * 4), {})
    batches = training_batches(experience, config, step=1)
    assert [batch.denominator for batch in batches] == [4.0] * 4
    branches = [(t.root_ids[0], branch) for batch in batches for t in map(filled, batch.trees) for branch in t.branches]
    assert sorted(branch.token_ids[0] for _, branch in branches) == [10 * p + g for p in range(4) for g in range(4)]
    assert all(branch.token_ids[0] // 10 == root for root, branch in branches)
    assert all(
        branch.columns["advantages"] == [0.75 if branch.token_ids[0] % 10 == 0 else -0.25] for _, branch in branches
    )
    mixed = any(len(batch.trees) > 1 for batch in batches)
    assert mixed == (split == "completions")


def kept(*tokens: list[int]) -> KeptTokens:
    return KeptTokens(np.concatenate(tokens).astype(np.int32), np.array([len(x) for x in tokens], np.int32))


def test_kept_tokens_follow_their_tokens_by_hand() -> None:
    trees = [
        Tree([10], [Branch([1, 2], kept=kept([1, 7], [2])), Branch([3], kept=kept([4, 3, 8]))]),
        Tree([20, 21], [Branch([4], kept=kept([4]))]),
    ]
    row = micro_batch(trees)
    assert row.kept is not None and row.target_N.tolist() == [1, 2, 3, 4]
    assert row.kept.padded().tolist() == [[1, 7, -1], [2, -1, -1], [4, 3, 8], [4, -1, -1]]
    first, second = shard(trees, num_ranks=2, micro_batch_tokens=3)
    assert [x.kept.padded().tolist() for x in first if x.kept] == [[[1, 7], [2, -1]], [[4, 3, 8]]]
    assert [x.kept.padded().tolist() for x in second if x.kept] == [[[4]], []]


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_a_stored_group_gives_the_rows_of_its_tokens(num_ranks: int) -> None:
    """Also where the group is cut, and for a rank without work: tokens, log-probabilities, routes and kept tokens."""
    rng = np.random.default_rng(3)
    groups = [
        Group(p, [50 + p] * (p + 1), [completion(rng, 3 * g + p + 1) for g in range(4)], routes(*range(p + 1)))
        for p in range(3)
    ]
    columns = {0: {"advantages": 0.5}, 2: {"advantages": -1.5}, 3: {"advantages": 0.25}}
    whole = [
        Tree(
            group.prompt_ids,
            [
                Branch(
                    done.token_ids,
                    {"rollout_logprobs": done.logprobs, "advantages": [columns[g]["advantages"]] * done.num_tokens},
                    done.routed_experts,
                    done.kept_tokens,
                )
                for g, done in enumerate(group.completions)
                if g in columns
            ],
            root_experts=group.routed_experts,
        )
        for group in groups
    ]
    by_name: dict[str, Any] = {}
    for group in groups:
        by_name |= {name: done.columns() for name, done in zip(names(group), group.completions, strict=True)}
        by_name[f"{group.index} routes"] = group.routed_experts
    by_lengths = trees.shard(
        [stored_tree(stored(group, names(group), f"{group.index} routes"), columns) for group in groups],
        num_ranks=num_ranks,
        micro_batch_tokens=17,
    )
    expected = shard(whole, num_ranks=num_ranks, micro_batch_tokens=17)
    for rows, rows_expected in zip(by_lengths, expected, strict=True):
        for row, row_expected in zip(rows, rows_expected, strict=True):
            built = row.micro_batch(by_name)
            assert_same(built, row_expected)
            assert row.trained == bool(len(built.target_N)) and row.num_values == len(built.target_N)
            assert not row.trained or row.num_new_tokens == built.num_new_tokens
    assert num_ranks < 5 or not all(row.trained for rows in by_lengths for row in rows)


def test_routes_of_few_experts_take_a_byte() -> None:
    def dtype(expert: int) -> np.dtype:
        done = Completion([1, 2], [0.0, 0.0], "", "stop", 0, routed_experts=routes(expert, -1))
        experts_TLK = done.columns().routed_experts
        assert experts_TLK is not None and experts_TLK.flatten().tolist() == [expert, -1]
        return experts_TLK.dtype

    assert [dtype(127), dtype(128)] == [np.dtype(np.int8), np.dtype(np.int16)]


def names(group: Group) -> list[str]:
    return [f"{group.index} {g}" for g in range(len(group.completions))]


def completion(rng: np.random.Generator, length: int) -> Completion:
    ids = rng.integers(0, 40, length).tolist()
    kept_ids = [[token, *rng.integers(0, 40, int(rng.integers(0, 3))).tolist()] for token in ids]
    logprobs = (-rng.random(length, np.float32)).tolist()
    return Completion(ids, logprobs, "", "stop", 0, routes(*rng.integers(-1, 90, length)), kept(*kept_ids))


def assert_same(built: MicroBatch, expected: MicroBatch) -> None:
    for name in ("token_ids_T", "source_N", "target_N", "sequence_N", "experts_TLK"):
        np.testing.assert_array_equal(getattr(built, name), getattr(expected, name))
    assert (built.lengths, built.parents, built.repeated) == (expected.lengths, expected.parents, expected.repeated)
    assert built.columns.keys() == expected.columns.keys() and built.kept is not None and expected.kept is not None
    for name, values_N in built.columns.items():
        np.testing.assert_array_equal(values_N, expected.columns[name])
    np.testing.assert_array_equal(built.kept.padded(), expected.kept.padded())
