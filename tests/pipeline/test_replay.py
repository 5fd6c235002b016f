"""Replayed routes in a packed batch: each token's own, whatever lies beside it; gates that learn; what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Branch, MicroBatch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.train.build import build_causal_lm
from pipeline.train.spec import TrainSpec
from rollout.types import Routes
from tests.rollout import tiny

NUM_LAYERS, TOP_K, NUM_EXPERTS = 3, 2, 8


@pytest.fixture(scope="module")
def model() -> LogprobModel:
    return LogprobModel(tiny.moe(0))


def random_routes(rng: np.random.Generator, length: int) -> Routes:
    routes = [rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(length * NUM_LAYERS)]
    return np.array(routes, np.int16).reshape(length, NUM_LAYERS, TOP_K)


def groups() -> list[Tree]:
    """Two prompts with three completions each and random routes, some of them unknown."""
    rng = np.random.default_rng(0)
    trees = []
    for length in (5, 9):
        branches = []
        for size in (4, 7, 2):
            routes = random_routes(rng, size)
            routes[-1] = -1
            branches.append(Branch(rng.integers(3, 200, size).tolist(), experts=routes))
        root = random_routes(rng, length)
        root[: length // 2] = -1
        trees.append(Tree(rng.integers(3, 200, length).tolist(), branches, root_experts=root))
    return trees


def logprobs(model: LogprobModel, row: MicroBatch, experts_TLK: Routes | None) -> torch.Tensor:
    ids_T, source_N, target_N = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
    given = None if experts_TLK is None else torch.from_numpy(experts_TLK)
    return model(ids_T, Layout(row.lengths, row.parents), source_N, target_N, given)


def chosen(model: LogprobModel) -> np.ndarray:
    return model.routers.chosen_TLK.numpy()


@torch.no_grad()
def test_a_packed_token_goes_where_it_would_go_alone(model: LogprobModel) -> None:
    row = micro_batch(groups())
    packed = logprobs(model, row, row.experts_TLK).numpy()
    alone = []
    for tree in groups():
        for branch in tree.branches:
            single = micro_batch([Tree(tree.root_ids, [branch], root_experts=tree.root_experts)])
            alone.append(logprobs(model, single, single.experts_TLK).numpy())
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=2e-5)
    assert np.abs(packed - logprobs(model, row, None).numpy()).max() > 1e-2, "other experts must say something else"


@torch.no_grad()
def test_known_routes_are_taken_and_unknown_ones_left_to_the_gate(model: LogprobModel) -> None:
    row = micro_batch(groups())
    assert row.experts_TLK is not None
    logprobs(model, row, row.experts_TLK)
    known_T = (row.experts_TLK >= 0).all(axis=(1, 2))
    assert known_T.any() and not known_T.all()
    replayed = chosen(model)
    np.testing.assert_array_equal(replayed[known_T], row.experts_TLK[known_T])
    logprobs(model, row, None)
    own = chosen(model)
    assert (own[known_T] != row.experts_TLK[known_T]).any()
    np.testing.assert_array_equal(np.sort(replayed[~known_T][:, 0]), np.sort(own[~known_T][:, 0]))


@torch.no_grad()
def test_replaying_a_models_own_routes_changes_nothing(model: LogprobModel) -> None:
    row = micro_batch(groups())
    before = logprobs(model, row, None).numpy()
    np.testing.assert_allclose(logprobs(model, row, chosen(model).astype(np.int16)).numpy(), before, atol=1e-6)


def test_gates_learn_from_replayed_routes(model: LogprobModel) -> None:
    """Only through the weights of the experts that were given: those of others get no gradient."""
    row = micro_batch(groups())
    given = np.broadcast_to(np.array([2, 5], np.int16), (len(row.token_ids_T), NUM_LAYERS, TOP_K)).copy()
    model.zero_grad()
    logprobs(model, row, given).sum().backward()
    for gate in model.routers.gates:
        moved = gate.module.weight.grad.abs().amax(dim=1) > 0
        assert moved.nonzero().flatten().tolist() == [2, 5]


def test_a_dense_model_has_nothing_to_replay(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(0), tmp_path / "dense")
    spec = TrainSpec(
        folder, "float32", TrainerConfig(), OptimizerConfig(learning_rate=1e-3), total_steps=1, routing_replay=True
    )
    with pytest.raises(ValueError, match=r"routing_replay .*LlamaForCausalLM"):
        build_causal_lm(spec)
