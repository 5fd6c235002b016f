"""Layouts on real ranks: where experts and optimizer state lie can't be seen in what is trained, saved or resumed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from configs.train import TrainerConfig
from pipeline.train.expert_parallel import ExpertSharding
from pipeline.weights.architecture import architecture_file
from pipeline.weights.fresh import create_model
from rollout.checkpoint import checkpoint_shapes
from tests.pipeline import dropping_ranks, layout_ranks
from tests.pipeline.families import BASE
from tests.pipeline.rank_processes import run_ranks

ranks = pytest.mark.ranks


def train(
    model: Path, folder: Path, name: str, *, num: int, zero: int, experts: int, others: tuple[str, ...] = ()
) -> Any:
    """The trace of five updates, and of the last two again from the states of `others`, in `num` ranks."""
    states = [folder / f"{other}.state" for other in others]
    run_ranks(layout_ranks.main, num, folder, model, folder / f"{name}.npz", zero, experts, "float32", *states)
    return dict(np.load(folder / f"{name}.npz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return create_model("tiny", 0, folder / "tiny")


@pytest.fixture(scope="module")
def sharded(model: Path, folder: Path) -> dict[str, np.ndarray]:
    return train(model, folder, "sharded", num=2, zero=1, experts=2)


@pytest.fixture(scope="module")
def whole(model: Path, folder: Path, sharded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return train(model, folder, "whole", num=1, zero=2, experts=1, others=("sharded",))


def weights(trace: dict[str, np.ndarray], name: str) -> Iterator[tuple[str, np.ndarray]]:
    return ((key.removeprefix(f"{name}/"), values) for key, values in trace.items() if key.startswith(f"{name}/"))


def assert_same(trace: dict[str, np.ndarray], other: dict[str, np.ndarray], resumed: str = "trained") -> None:
    np.testing.assert_allclose(trace["losses"], other["losses"], rtol=1e-6)
    np.testing.assert_allclose(trace["norms"], other["norms"], rtol=1e-5)
    np.testing.assert_allclose(trace["logprobs"], other["logprobs"], rtol=1e-6)
    expected = dict(weights(other, "trained"))
    found = dict(weights(trace, resumed))
    assert found.keys() == expected.keys() and len(found) > 50
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)


@ranks
def test_experts_on_two_ranks_train_as_on_one(sharded: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> None:
    assert_same(sharded, whole)
    assert abs(whole["logprobs"][0] - whole["logprobs"][1]) > 0.02  # other experts than the gates' speak differently


@ranks
def test_what_one_layout_saved_another_resumes(sharded: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> None:
    """Two ranks, their experts apart and their optimizer state in two, continued by one rank."""
    assert_same(whole, sharded, resumed="sharded")


@ranks
def test_a_sharded_model_is_saved_whole(model: Path, folder: Path, sharded: dict[str, np.ndarray]) -> None:
    assert checkpoint_shapes(folder / "sharded.hf") == checkpoint_shapes(model)


@ranks
@pytest.mark.slow
@pytest.mark.parametrize(("num", "zero"), [(2, 3), (4, 2), (4, 3)])
def test_stages_and_copies_of_experts_agree(
    model: Path, folder: Path, whole: dict[str, np.ndarray], num: int, zero: int
) -> None:
    """On four ranks each expert lies on two: its gradient is summed over these, its norm counted once."""
    trace = train(model, folder, f"{num}-{zero}", num=num, zero=zero, experts=2, others=("whole",))
    assert_same(trace, whole)
    assert_same(trace, whole, resumed="whole")


@ranks
@pytest.mark.slow
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2_routes_by_its_own_gate(folder: Path, tmp_path: Path, method: str) -> None:
    """AutoEP's own router would limit `greedy` to one group of two here."""
    sizes = json.loads(architecture_file("tiny_v2").read_text())
    (tmp_path / "v2.json").write_text(json.dumps(sizes | {"topk_method": method}))
    model = create_model(str(tmp_path / "v2.json"), 0, tmp_path / "v2")
    sharded = train(model, tmp_path, "sharded", num=2, zero=1, experts=2)
    assert_same(train(model, tmp_path, "whole", num=1, zero=1, experts=1, others=("sharded",)), sharded)


MIXTURE = BASE | {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 48}),
        ("mixtral", {}),
    ],
)
def test_mixtures_of_other_families_train_as_on_one_rank(tmp_path: Path, family: str, others: dict[str, int]) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps(MIXTURE | others | {"model_type": family}))
    model = create_model(str(tmp_path / "sizes.json"), 0, tmp_path / "model")
    sharded = train(model, tmp_path, "sharded", num=2, zero=1, experts=2)
    assert_same(train(model, tmp_path, "whole", num=1, zero=1, experts=1, others=("sharded",)), sharded)
    assert checkpoint_shapes(tmp_path / "sharded.hf") == checkpoint_shapes(model)


@ranks
def test_dropped_pairs_are_neither_sent_nor_computed(folder: Path) -> None:
    """On two ranks, each with one of two groups of experts: a device computes no more than its budget of what both
    send it, and drops what one rank with all tokens drops."""
    model = create_model("tiny_v2", 0, folder / "dropping")
    for num in (1, 2):
        run_ranks(dropping_ranks.main, num, folder, model, folder / f"dropping-{num}.npz")
    one, two = (dict(np.load(folder / f"dropping-{num}.npz")) for num in (1, 2))
    load_LG = two["load"].reshape(len(two["load"]), 2, -1).sum(axis=2)
    budget = int(dropping_ranks.CAPACITY * load_LG[0].sum() / 2)
    assert (load_LG > budget).any()
    np.testing.assert_array_equal(two["rows"].T, np.minimum(load_LG, budget))
    np.testing.assert_array_equal(one["rows"][0], two["rows"].sum(axis=0))
    assert two["dropped"] == pytest.approx(1 - two["rows"].sum() / load_LG.sum())
    assert one.keys() == two.keys()
    for name in one.keys() - {"rows"}:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expert_parallel_size=2 .*num_ranks=3"):
        TrainerConfig(num_ranks=3, expert_parallel_size=2)
    with pytest.raises(ValueError, match=r"expert_parallel_size .*zero_stage >= 1"):
        TrainerConfig(num_ranks=2, expert_parallel_size=2, zero_stage=0)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**small, vocab_size=32))
    with pytest.raises(ValueError, match=r"expert_parallel_size=2 .*'llama'"):
        ExpertSharding(dense, 2)
