"""The start-up checks: packed rows give each sequence what the model gives it alone, or the model is refused."""

import pytest
import torch
from torch import nn

from pipeline.data.trees import micro_batch
from pipeline.models.attention import Layout
from pipeline.models.cut_down import cut_down
from pipeline.models.logprobs import LogprobModel, refuse_other_logits
from pipeline.models.parity import narrow_windows, probe_trees, sequences
from pipeline.models.rounding import perturbed_rounding
from pipeline.models.score import refuse_other_scores
from tests.pipeline.families import random_model

WITH_A_STATE = {
    "Qwen3-Next": "Qwen3NextGatedDeltaNet",
    "Qwen3.5": "Qwen3_5GatedDeltaNet",
    "Falcon-H1": "FalconH1Mixer",
    "LFM2": "Lfm2ShortConv",
    "Mamba": "MambaMixer",
    "Mamba 2": "Mamba2Mixer",
    "RWKV": "RwkvSelfAttention",
    "BLOOM": "BloomAttention",  # no state, but a mask of its own
}
ATTENTION = ("Llama", "Qwen3-MoE", "Mistral", "Gemma 3", "OLMo 3", "GLM-4", "DeepSeek-V2", "DeepSeek-V3", "GPT-2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ATTENTION)
def test_a_model_of_attention_is_accepted_in_either_precision(family: str, dtype: torch.dtype) -> None:
    refuse_other_logits(random_model(family, dtype=dtype))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma 3", "Mixtral", "DeepSeek-V3", "GPT-2"])
def test_a_reward_model_of_attention_is_accepted_in_either_precision(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        refuse_other_scores(random_model(family, scored=True, dtype=dtype))


@pytest.mark.parametrize(("family", "layer"), WITH_A_STATE.items())
def test_layers_that_carry_a_state_are_refused_by_their_class(family: str, layer: str) -> None:
    with pytest.raises(ValueError, match=layer):
        refuse_other_logits(random_model(family))


@pytest.mark.parametrize("family", ["Qwen3-Next", "Qwen3.5"])
def test_reward_models_that_carry_a_state_are_refused_too(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="GatedDeltaNet"):
            refuse_other_scores(random_model(family, scored=True, dtype=dtype))


def test_one_layer_of_each_kind_stands_for_a_model() -> None:
    """The verdict of the start-up check, though most layers are gone and the weights are others."""
    verdicts: dict[str, int] = {"Llama": 1, "OLMo 3": 2, "DeepSeek-V3": 2}
    for family, kinds in verdicts.items():
        settings = {"layer_types": ["sliding_attention", "full_attention"] * 3} if family == "OLMo 3" else {}
        small = cut_down(random_model(family, num_hidden_layers=6, **settings).to("meta"))
        assert small.config.num_hidden_layers == len(small.model.layers) == kinds
        refuse_other_logits(small)
    for family, reason in (("Gemma 2", "softcap"), ("Granite", "log-probabilities"), ("Qwen3-Next", "GatedDeltaNet")):
        with pytest.raises(ValueError, match=reason):
            refuse_other_logits(cut_down(random_model(family).to("meta")))
    mixture = cut_down(random_model("Qwen3-MoE", moe_intermediate_size=16).to("meta")).model.layers[0].mlp.experts
    assert not torch.equal(mixture.down_proj[0], mixture.down_proj[1])


class Remembering(nn.Module):
    """A projection to which a share of the mean of all earlier rows is added: a leak of no known kind."""

    def __init__(self, projection: nn.Module, share: float) -> None:
        super().__init__()
        self.projection, self.share = projection, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        so_far = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.projection(hidden) + self.share * so_far


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_leak_far_below_rounding_is_found(dtype: torch.dtype) -> None:
    model = random_model("Llama", dtype=dtype)
    attention = model.model.layers[1].self_attn
    attention.o_proj = Remembering(attention.o_proj, 1e-6)
    with pytest.raises(ValueError, match="Remembering"):
        refuse_other_logits(model)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Gemma 2", "softcap"),
        ("gpt-oss", "s_aux"),
        ("Granite", "log-probabilities"),
        ("MiniCPM3", "log-probabilities"),
        ("Command R", "log-probabilities"),
        ("DeepSeek-V3.2", "packed rows"),
        ("Nemotron", "packed rows"),
    ],
)
def test_what_is_computed_otherwise_is_refused(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        refuse_other_logits(random_model(family))


def test_a_cap_that_a_young_model_does_not_reach_is_seen() -> None:
    """Its logits are a hundredth of the cap, those of the trained model will not be."""
    model = random_model("Gemma 2", attn_logit_softcapping=None, final_logit_softcapping=30.0, initializer_range=1e-3)
    with pytest.raises(ValueError, match="log-probabilities"):
        refuse_other_logits(model)


def test_positions_that_ignore_the_layout_are_refused() -> None:
    model = random_model("GPT-2")
    rows = model.transformer.wpe.forward

    def counted(position_ids: torch.Tensor) -> torch.Tensor:
        return rows(torch.arange(position_ids.shape[1])[None])

    model.transformer.wpe.forward = counted
    with pytest.raises(ValueError, match="log-probabilities"):
        refuse_other_logits(model)


@pytest.mark.parametrize("family", ["Mistral", "Gemma 3", "OLMo 3"])
def test_beyond_its_window_a_packed_row_is_the_models_own(family: str) -> None:
    model = random_model(family, sliding_window=4)
    trees = probe_trees(model)
    with torch.no_grad():
        own = [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in sequences(trees)]
        wide = random_model(family, sliding_window=64)(torch.tensor([sequences(trees)[0]])).logits[0].log_softmax(-1)
        row = micro_batch(trees)
        tensors = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
        token_ids_T, source_N, target_N = tensors
        values_N = LogprobModel(model)(token_ids_T, Layout(row.lengths, row.parents), source_N, target_N)
    assert (own[0] - wide).abs().max() > 1e-2  # or the agreement would prove nothing
    for sequence, ids in enumerate(sequences(trees)):
        values = values_N[torch.from_numpy(row.sequence_N == sequence)]
        expected = own[sequence][torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-len(values) :]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = random_model("Mistral")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    refuse_other_logits(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.sliding_window == 64
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and torch.equal(parameter, before[name])


def test_windows_are_narrow_within_the_block_alone() -> None:
    model = random_model("OLMo 3")
    with narrow_windows(model):
        assert model.config.sliding_window == 5
    assert model.config.sliding_window == 64


def test_rounding_is_that_of_the_precision_and_grows_with_depth() -> None:
    ids = torch.arange(3, 23)[None]

    def rounding(model: nn.Module) -> float:
        with torch.no_grad():
            plain = model(ids).logits.float().log_softmax(-1)
            with perturbed_rounding(model, seed=1):
                off = model(ids).logits.float().log_softmax(-1)
            assert torch.equal(plain, model(ids).logits.float().log_softmax(-1))
        return (off - plain).abs().mean().item()

    float32, bfloat16 = (rounding(random_model("Llama", dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert 1e4 < bfloat16 / float32 < 1e6  # 2^16 times as coarse
    assert rounding(random_model("Llama", num_hidden_layers=12)) > float32


def test_rounding_is_the_same_for_the_same_seed() -> None:
    model = random_model("Llama")
    ids = torch.arange(3, 23)[None]

    def off(seed: int) -> torch.Tensor:
        with torch.no_grad(), perturbed_rounding(model, seed):
            return model(ids).logits

    assert torch.equal(off(1), off(1)) and not torch.equal(off(1), off(2))
