"""Balance while a model trains: gradients, splits of a batch, and skewed routers that become balanced."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from configs.balance import V2Balance, V3Balance
from pipeline.data.trees import Branch, MicroBatch, Tree, micro_batch, scored_tree
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.models.score import ScoreModel
from pipeline.train.balancer import Balancer, protected_tokens
from tests.pipeline.sharding import shard
from tests.pipeline.test_routing import CONFIGS, model_of

CPU = torch.device("cpu")
V2 = V2Balance(type="v2", expert=0.3, device=0.5, communication=0.2, capacity=None)
V3 = V3Balance(type="v3", bias_rate=0.01, sequence=0.5)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def conversations(count: int = 12) -> list[Tree]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 20, count)
    return [Tree(rng.integers(3, 97, n).tolist(), root_mask=[0] + [1] * (int(n) - 1)) for n in sizes]


def rows_of(trees: list[Tree], tokens: int) -> list[MicroBatch]:
    return shard(trees, num_ranks=1, micro_batch_tokens=tokens)[0]


def forward(model: LogprobModel, row: MicroBatch) -> Tensor:
    ids_T, source_N, target_N = map(torch.from_numpy, (row.token_ids_T, row.source_N, row.target_N))
    return model(ids_T, Layout(row.lengths, row.parents, row.repeated), source_N, target_N)


def update(
    model: LogprobModel, balancer: Balancer, rows: list[MicroBatch], weight: float = 1e-3
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and figures of a step whose loss is `weight` times the negative log-likelihood."""
    model.zero_grad()
    balancer.begin_batch(rows)
    for row in rows:
        balancer.begin_row(row)
        (-weight * forward(model, row).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, balancer.step()


def model_and_balancer(family: str, config: V2Balance | V3Balance | None) -> tuple[LogprobModel, Balancer]:
    model = LogprobModel(model_of(CONFIGS[family])).train()
    return model, Balancer(model.routers, config, CPU)


CASES = pytest.mark.parametrize(("family", "config"), [("deepseek_v2", V2), ("deepseek_v3", V3)], ids=["v2", "v3"])


@CASES
def test_gradients_are_those_of_the_losses(family: str, config: V2Balance | V3Balance) -> None:
    """Collected outside the model and added to its loss, the losses give the gradient they give when attached."""
    config = config.model_copy(update={"bias_rate": 0.0}) if isinstance(config, V3Balance) else config
    model, balancer = model_and_balancer(family, config)
    [row] = rows_of(conversations(), 4096)
    found, figures = update(model, balancer, [row])
    losses: list[Tensor] = []

    def collect(layer: int, scores_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        losses.extend(balancer._losses(model.routers.gates[layer], config, scores_TE, experts_TK))
        return weights_TK, experts_TK

    model.routers.balance = collect
    model.zero_grad()
    logprobs_N = forward(model, row)
    balance = torch.stack(losses).sum() / 12
    (balance - 1e-3 * logprobs_N.sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    reported = sum(value for key, value in figures.items() if key.endswith("_balance_mean"))
    assert reported == pytest.approx(balance.item(), rel=1e-5)
    plain, _ = update(model, Balancer(LogprobModel(model.causal_lm).routers, None, CPU), [row])
    gate = f"causal_lm.{model.routers.names[0]}.weight"
    assert (plain[gate] - found[gate]).abs().max() > 1e-4  # the comparison above could have failed


@CASES
def test_neither_micro_batches_nor_checkpointing_change_it(family: str, config: V2Balance | V3Balance) -> None:
    model, balancer = model_and_balancer(family, config)
    bias = [gate.bias_E.clone() for gate in model.routers.gates if gate.bias_E is not None]
    expected, expected_figures = update(model, balancer, rows_of(conversations(), 4096))
    ends = [gate.bias_E.clone() for gate in model.routers.gates if gate.bias_E is not None]
    assert [torch.equal(*pair) for pair in zip(bias, ends, strict=True)] == [False] * len(bias)
    for tokens, checkpointing in ((24, False), (50, True)):
        for gate, before in zip(model.routers.gates, bias, strict=False):
            gate.module.e_score_correction_bias.copy_(before)
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        rows = rows_of(conversations(), tokens)
        assert len(rows) > 2
        found, figures = update(model, balancer, [*rows, silent(rows[0])])
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        assert figures == pytest.approx(expected_figures, rel=1e-5)
        for gate, after in zip(model.routers.gates, ends, strict=False):
            assert torch.equal(gate.module.e_score_correction_bias, after)


@CASES
def test_cut_groups_train_and_balance_as_whole_ones(family: str, config: V2Balance | V3Balance) -> None:
    """The repeated prompts are in no mean twice: neither in the losses nor in the load that moves the bias."""
    rng = np.random.default_rng(0)
    groups = [
        Tree(rng.integers(3, 97, 30).tolist(), [Branch(rng.integers(3, 97, int(n)).tolist()) for n in lengths])
        for lengths in rng.integers(3, 20, (3, 6))
    ]
    if isinstance(config, V2Balance):  # all are protected, so the budget of a row drops none
        config = config.model_copy(update={"capacity": 0.5, "never_dropped": 1.0})
    model, balancer = model_and_balancer(family, config)
    bias = [gate.bias_E.clone() for gate in model.routers.gates if gate.bias_E is not None]
    expected, expected_figures = update(model, balancer, rows_of(groups, 4096))
    ends = [gate.bias_E.clone() for gate in model.routers.gates if gate.bias_E is not None]
    load = balancer.load
    for gate, before in zip(model.routers.gates, bias, strict=False):
        gate.module.e_score_correction_bias.copy_(before)
    rows = rows_of(groups, 50)
    assert sum(len(row.repeated) for row in rows) > 3 and max(len(row.token_ids_T) for row in rows) <= 50
    found, figures = update(model, balancer, rows)
    assert balancer.load == load
    assert sum(next(iter(load.values()))) == sum(group.num_tokens for group in groups) * model.routers.gates[0].top_k
    assert figures == pytest.approx(expected_figures, rel=1e-5)
    for gate, after in zip(model.routers.gates, ends, strict=False):
        assert torch.equal(gate.module.e_score_correction_bias, after)
    flat, expected_flat = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    assert (flat - expected_flat).norm() < 1e-6 * expected_flat.norm()


def silent(row: MicroBatch) -> MicroBatch:
    """What a rank without work computes."""
    nothing = np.empty(0, np.int64)
    return MicroBatch(row.token_ids_T[:1], (1,), (-1,), nothing, nothing, nothing, 0, {})


def test_the_bias_balances_a_skewed_router() -> None:
    """Experts 0 to 3, one group, are preferred by far; nothing but the bias changes, and it makes the load even."""
    model, balancer = model_and_balancer("deepseek_v3", V3Balance(type="v3", bias_rate=0.02, sequence=0.0))
    [row] = rows_of(conversations(), 4096)
    for gate in model.routers.gates:
        gate.module.e_score_correction_bias[:] = torch.tensor([0.3, 0.2, 0.2, 0.2, 0, 0, 0, 0])
    figures: list[dict[str, float]] = []
    for _ in range(25):
        forward(model, row)
        figures.append(balancer.step())
    assert figures[0]["experts/max_vio_mean"] > 1.2 and figures[0]["experts/entropy_mean"] < 0.8
    violation = np.mean([each["experts/max_vio_mean"] for each in figures[-5:]])  # it swings by a few of 118 tokens
    assert violation < 0.5 and figures[-1]["experts/entropy_mean"] > 0.96 and figures[-1]["experts/dead_count"] == 0
    assert model.routers.balance is None  # without a loss the gates' weights are left alone


@CASES
def test_a_reward_model_is_balanced_as_a_policy_is(family: str, config: V2Balance | V3Balance) -> None:
    torch.manual_seed(0)
    config_of_one_score = deepcopy(CONFIGS[family])
    config_of_one_score.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config_of_one_score)
    model = ScoreModel(classifier).train()
    balancer = Balancer(model.routers, config, CPU)
    row = micro_batch([scored_tree([5, 6, 7, 8], [[9, 10, 11], [12, 13]])])
    balancer.begin_batch([row])
    balancer.begin_row(row)
    ids_T, last_N = torch.from_numpy(row.token_ids_T), torch.from_numpy(row.source_N)
    (0.0 * model(ids_T, Layout(row.lengths, row.parents), last_N).sum()).backward()  # leaves the losses' gradient
    assert all(gate.module.weight.grad.abs().sum() > 0 for gate in model.routers.gates)
    figures = balancer.step()
    assert any(name.startswith("loss/") for name in figures) and figures["experts/max_vio_mean"] > 0
    biases = [gate.module.e_score_correction_bias for gate in model.routers.gates if family == "deepseek_v3"]
    assert all(bias.abs().max() == pytest.approx(0.01) for bias in biases)


def test_the_losses_balance_a_skewed_router() -> None:
    model, balancer = model_and_balancer("deepseek_v2", V2)
    rows = rows_of(conversations(), 4096)
    gates = [gate.module.weight for gate in model.routers.gates]
    with torch.no_grad():
        for weight_EH in gates:
            weight_EH[1] = weight_EH[0]
            weight_EH[:2] *= 4
    optimizer = torch.optim.Adam(gates, lr=1e-2)
    figures = []
    for _ in range(25):
        figures.append(update(model, balancer, rows, weight=0.0)[1])
        optimizer.step()
    first, last = figures[0], figures[-1]
    assert last["experts/max_vio_mean"] < 0.6 * first["experts/max_vio_mean"]
    assert last["experts/entropy_mean"] > first["experts/entropy_mean"]
    for name in ("expert", "device", "communication"):
        assert last[f"loss/{name}_balance_mean"] < first[f"loss/{name}_balance_mean"]


def test_tokens_are_dropped_in_training_alone() -> None:
    model, balancer = model_and_balancer("deepseek_v2", V2.model_copy(update={"capacity": 0.5, "never_dropped": 0.0}))
    [row] = rows_of(conversations(), 4096)
    with torch.no_grad():
        expected_N = forward(model, row)
    _, figures = update(model, balancer, [row])
    assert 0.3 < figures["experts/dropped_rate"] < 0.6
    with torch.no_grad():
        assert torch.equal(forward(model, row), expected_N)
    balancer.begin_batch([row])
    balancer.begin_row(row)
    assert not torch.allclose(forward(model, row), expected_N, atol=1e-3)
    model, balancer = model_and_balancer("deepseek_v2", V2.model_copy(update={"capacity": 0.5, "never_dropped": 1.0}))
    assert update(model, balancer, [row])[1]["experts/dropped_rate"] == 0


def test_the_protected_tenth_is_the_same_however_it_is_packed() -> None:
    trees = conversations(2000)
    protected = [bool(protected_tokens(micro_batch([tree]), 0.1).all()) for tree in trees]
    assert 0.08 < np.mean(protected) < 0.12
    row = micro_batch(trees)
    assert protected_tokens(row, 0.1).tolist() == [
        known for tree, known in zip(trees, protected, strict=True) for _ in tree.root_ids
    ]
    branches = [Branch([5, 6]), Branch([7])]  # these go with their prompt
    known = [protected_tokens(micro_batch([Tree(tree.root_ids, branches)]), 0.1) for tree in trees[:50]]
    assert [each.all() for each in known] == protected[:50] and [each.any() for each in known] == protected[:50]


def test_balance_that_a_model_cannot_have_is_refused() -> None:
    for family, config, message in (
        ("deepseek_v2", V3, "take type 'v2'"),
        ("deepseek_v3", V2, "take type 'v3'"),
        ("deepseek_v2_lite", V2, "one group"),
    ):
        with pytest.raises(ValueError, match=message):
            model_and_balancer(family, config)


def test_a_budget_needs_a_group_of_experts_on_each_rank() -> None:
    model = LogprobModel(model_of(CONFIGS["deepseek_v2"]))
    dropping = V2.model_copy(update={"capacity": 1.0})
    with pytest.raises(ValueError, match=r"capacity=1\.0.*expert_parallel_size to the model's 4 groups"):
        Balancer(model.routers, dropping, CPU, torch.distributed.group.WORLD)
    Balancer(model.routers, V2, CPU, torch.distributed.group.WORLD)  # nothing is dropped


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="balance nothing"):
        V2Balance(type="v2", capacity=None, expert=0.0, device=0.0, communication=0.0)
    with pytest.raises(ValueError, match="balance nothing"):
        V3Balance(type="v3", bias_rate=0.0, sequence=0.0)
