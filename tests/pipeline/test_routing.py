"""The gates of every family: untouched when nothing is asked of them, exact when experts are given, counted once."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.models.routing import Routers
from rollout.types import NO_ROUTE
from tests.pipeline.small_models import SMALLEST

SIZES = SMALLEST | {"num_hidden_layers": 3}
V2_SIZES = SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "deepseek_v3": DeepseekV3Config.from_json_file("configs/models/tiny.json"),
    "deepseek_v2": DeepseekV2Config(**V2_SIZES, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "deepseek_v2_lite": DeepseekV2Config(**V2_SIZES, topk_method="greedy", n_group=1, topk_group=1),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    ),
}
LAYOUT = Layout((9, 6, 5), (-1, 0, -1))
NUM_TOKENS = 20


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Weights large enough that gates decide; a V3 gate's bias is not zero."""
    config.vocab_size = 97
    torch.manual_seed(0)
    model = Auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def token_ids() -> Tensor:
    return torch.randint(3, 97, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


def logprobs(model: LogprobModel, experts_TLK: Tensor | None = None) -> Tensor:
    ids_T = token_ids()
    return model(ids_T, LAYOUT, torch.arange(NUM_TOKENS - 1), ids_T[1:], experts_TLK)


def gradients(model: LogprobModel, experts_TLK: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    logprobs(model, experts_TLK).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LogprobModel:
    return LogprobModel(model_of(CONFIGS[request.param]))


def other_experts(model: LogprobModel) -> Tensor:
    """For every token and layer K experts that differ from one another, few of them the gate's choice."""
    gate = model.routers.gates[0]
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(NUM_TOKENS, len(model.routers), gate.num_experts, generator=generator)
    return scores.topk(gate.top_k, dim=-1).indices


def test_gates_answer_what_they_answer_without_us(model: LogprobModel) -> None:
    rows_TH = torch.randn(NUM_TOKENS, model.causal_lm.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for gate in model.routers.gates:
        model.routers.begin()
        for ours, own in zip(gate.module(rows_TH), type(gate.module).forward(gate.module, rows_TH), strict=True):
            assert torch.equal(ours, own)


def test_the_layers_are_the_models(model: LogprobModel) -> None:
    dense = getattr(model.causal_lm.config, "first_k_dense_replace", 0)
    layers = range(dense, model.causal_lm.config.num_hidden_layers)
    assert model.routers.names == [f"model.layers.{layer}.mlp.gate" for layer in layers]


def test_a_token_reaches_no_more_groups_than_allowed(model: LogprobModel) -> None:
    """Device-limited routing of V2, node-limited of V3: by the gate's own choice, and some tokens do reach all."""
    logprobs(model)
    gate, chosen_TLK = model.routers.gates[0], model.routers.chosen_TLK
    groups_TLK = chosen_TLK // (gate.num_experts // gate.num_groups)
    reached = [len(set(of)) for of in groups_TLK.flatten(0, 1).tolist()]
    assert max(reached) == gate.top_groups


def test_replaying_the_gates_own_choice_changes_no_bit(model: LogprobModel) -> None:
    values, own = logprobs(model).detach(), gradients(model)
    chosen_TLK = model.routers.chosen_TLK
    assert chosen_TLK.shape == (NUM_TOKENS, len(model.routers), model.routers.gates[0].top_k)
    assert torch.equal(logprobs(model, chosen_TLK.short()), values)
    for name, gradient in gradients(model, chosen_TLK.short()).items():
        torch.testing.assert_close(gradient, own[name], rtol=1e-5, atol=1e-6, msg=name)


def test_no_route_leaves_the_choice_to_the_gate(model: LogprobModel) -> None:
    values = logprobs(model).detach()
    chosen_TLK = model.routers.chosen_TLK
    unknown = torch.full_like(chosen_TLK, NO_ROUTE)
    assert torch.equal(logprobs(model, unknown), values)
    mixed = torch.where(torch.arange(NUM_TOKENS)[:, None, None] < 7, other_experts(model), unknown)
    logprobs(model, mixed)
    assert torch.equal(model.routers.chosen_TLK[:7], mixed[:7])
    assert torch.equal(model.routers.chosen_TLK[7:, 0], chosen_TLK[7:, 0])  # later layers see other inputs
    partly = chosen_TLK.clone()
    partly[3, :, 0] = NO_ROUTE
    assert torch.equal(logprobs(model, partly), values)


def test_given_experts_are_used_and_the_router_learns_from_them(model: LogprobModel) -> None:
    values, given_TLK = logprobs(model).detach(), other_experts(model)
    replayed = logprobs(model, given_TLK)
    assert (replayed - values).abs().max() > 1e-4
    assert torch.equal(model.routers.chosen_TLK, given_TLK)
    found = gradients(model, given_TLK)
    for name in model.routers.names:
        assert found[f"causal_lm.{name}.weight"].abs().max() > 0
    name = f"causal_lm.{model.routers.names[-1]}.weight"
    weight, step = dict(model.named_parameters())[name], 1e-2
    place = int(found[name].abs().argmax())
    with torch.no_grad():  # the gradient is that of the replayed pass: experts stay, weights move
        ends = []
        for sign in (1, -2):
            weight.view(-1)[place] += sign * step
            ends.append(logprobs(model, given_TLK).double().sum().item())
        weight.view(-1)[place] += step
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(found[name].view(-1)[place].item(), rel=0.02)


def test_weights_of_given_experts_by_hand() -> None:
    """V3: sigmoid scores without the bias, divided by their sum; V2: softmax over all experts, times the factor."""
    rows_TH = torch.randn(2, 128, generator=torch.Generator().manual_seed(4))
    [gate, *_] = Routers(model_of(CONFIGS["deepseek_v3"])).gates
    logits_TE = (rows_TH @ gate.module.weight.T).detach()
    weights_TK = gate.weights(logits_TE, torch.tensor([[7, 0], [3, 4]]))
    scores = torch.sigmoid(logits_TE)
    for row, (a, b) in enumerate([(7, 0), (3, 4)]):
        expected = torch.stack([scores[row, a], scores[row, b]]) / (scores[row, a] + scores[row, b])
        torch.testing.assert_close(weights_TK[row], expected)
    [gate, *_] = Routers(model_of(CONFIGS["deepseek_v2"])).gates
    logits_TE = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7]]).log1p()  # softmax: 1/36, 2/36, ... 8/36
    weights_TK = gate.weights(logits_TE, torch.tensor([[0, 7, 3]]))
    torch.testing.assert_close(weights_TK, 2.5 * torch.tensor([[1, 8, 4]]) / 36)


def test_load_counts_training_passes_once(model: LogprobModel) -> None:
    logprobs(model)
    chosen_TLK = model.routers.chosen_TLK
    model.routers.take_load()
    gradients(model)
    with torch.no_grad():
        logprobs(model)  # trains nothing, counts nothing
    ids_T, nothing = token_ids(), torch.empty(0, dtype=torch.long)
    model(ids_T[:1], Layout((1,), (-1,)), nothing, nothing).sum().backward()  # nor does a rank that only takes part
    gradients(model)
    load_LE = model.routers.take_load()
    assert load_LE is not None
    for layer, load_E in enumerate(load_LE.tolist()):
        chosen = chosen_TLK[:, layer].flatten().tolist()
        assert load_E == [2 * chosen.count(expert) for expert in range(model.routers.gates[0].num_experts)]
    assert model.routers.take_load() is None


@pytest.mark.parametrize("replays", [False, True])
def test_gradient_checkpointing_changes_nothing(model: LogprobModel, replays: bool) -> None:
    given_TLK = other_experts(model) if replays else None
    model.train()
    expected = gradients(model, given_TLK)
    load_LE = model.routers.take_load()
    model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, given_TLK)
    model.causal_lm.gradient_checkpointing_disable()
    assert load_LE is not None and torch.equal(model.routers.take_load(), load_LE)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_routes_of_another_model_are_refused(model: LogprobModel) -> None:
    top_k = model.routers.gates[0].top_k
    with pytest.raises(ValueError, match="model that made them"):
        logprobs(model, torch.zeros(NUM_TOKENS, len(model.routers) + 1, top_k, dtype=torch.long))
    with pytest.raises(ValueError, match="the highest 8"):
        logprobs(model, torch.full((NUM_TOKENS, len(model.routers), top_k), 8))


def test_a_dense_model_has_no_routers() -> None:
    model = LogprobModel(model_of(LlamaConfig(**SIZES)))
    assert not model.routers
    assert logprobs(model).shape == (NUM_TOKENS - 1,)
    assert model.routers.take_load() is None
    with pytest.raises(ValueError, match="do not fit"):
        logprobs(model, torch.zeros(NUM_TOKENS, 2, 2, dtype=torch.long))
