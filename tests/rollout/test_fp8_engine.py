"""Engines that keep weights or the KV cache in FP8, against `transformers` with the same weights quantised by us."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.sampling import RolloutConfig
from pipeline.models.fp8 import BLOCK, dequantise, quantise
from rollout.pooling import ScoreEngine
from tests.rollout.variants import Gaps, gaps_of

pytestmark = pytest.mark.engine

AMX = torch.cpu._is_amx_tile_supported()
needs_amx = pytest.mark.skipif(not AMX, reason="vLLM's FP8 product on the CPU needs AMX")

SCRIPT = """
from copy import deepcopy
import torch
from configs.sampling import SamplingConfig
from pipeline.models.attention import Layout
from pipeline.models.fp8 import BLOCK, dequantise, quantise
from pipeline.models.logprobs import LogprobModel
from pipeline.weights.export import export_checkpoint
from rollout.engine import RolloutEngine
from tests.rollout import tiny

def quantised(model, dtype):
    model = deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                for part in weight if weight.dim() == 3 else [weight]:
                    part.copy_(dequantise(quantise(part.to(dtype), BLOCK)))
    return model

def measure(fp8, dtype, root):
    # Whole blocks, as the real models': parts that vLLM merges into one matrix must not share any.
    models = [tiny.moe(seed, q_lora_rank=128, moe_intermediate_size=128) for seed in (0, 1)]
    folders = [tiny.save(model, root / str(seed)) for seed, model in enumerate(models)]
    if fp8 == ["exported"]:
        export_checkpoint(folders[0], root / "exported", "fp8")
        engine = RolloutEngine(root / "exported", tiny.CONFIG, dtype, seed=0)
        rounds = [0]
    else:
        engine = RolloutEngine(folders[0], tiny.CONFIG.model_copy(update={"fp8": fp8}), dtype, seed=0)
        rounds = [0, 1, 0]
    told, sampling = [], SamplingConfig(max_tokens=24)
    for version, seed in enumerate(rounds):
        if version:
            engine.load_weights(tiny.buckets(tiny.weights(folders[seed])), version)
        groups = list(engine.generate(tiny.PROMPTS, sampling, 4, 1))
        same = quantised(models[seed], torch.float32 if fp8 == ["exported"] else torch.bfloat16)
        told.append((tiny.rollout_gap(models[seed], groups)[0], tiny.rollout_gap(same, groups)[0]))
    if fp8 == ["weights"]:
        told.append(trainer_gaps(models[0].bfloat16(), groups))
    return told

def trainer_gaps(model, groups):
    "From a trainer in bfloat16 and from one that multiplies in FP8."
    gaps = []
    for fp8 in (False, True):
        policy, own = LogprobModel(model, fp8=fp8), []
        for group in groups:
            for completion in group.completions:
                ids, start = torch.tensor(group.prompt_ids + completion.token_ids), len(group.prompt_ids)
                with torch.no_grad():
                    rows = torch.arange(start - 1, len(ids) - 1)
                    logprobs = policy(ids, Layout((len(ids),), (-1,)), rows, ids[start:])
                own.append((logprobs - torch.tensor(completion.logprobs)).abs())
        gaps.append(torch.cat(own).mean().item())
    return tuple(gaps)
"""

VARIANTS = {
    "weights": (["weights"], "bfloat16", {}),
    "weights, latent cache": (["weights"], "bfloat16", {"VLLM_MLA_DISABLE": "0"}),
    "exported, latent cache": (["exported"], "bfloat16", {"VLLM_MLA_DISABLE": "0"}),
    "cache": (["kv_cache"], "float32", {}),
}
ROUNDED = "weights"
"""The variant that a CPU without AMX runs, with rounded weights."""


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Gaps:
    """Mean gap of every variant from the model and from its weights in FP8 blocks: fresh, after a sync of other
    weights, and after one of the first. An exported checkpoint is not synced. With weights in FP8 a last pair: the gap
    of the same engine from a trainer in bfloat16 and from one in FP8."""
    served = {name: variant for name, variant in VARIANTS.items() if AMX or name == ROUNDED}
    return gaps_of(SCRIPT, served, tmp_path_factory.mktemp("variants"))


@pytest.mark.parametrize(
    "variant", [ROUNDED, *(pytest.param(f"{name}, latent cache", marks=needs_amx) for name in ("weights", "exported"))]
)
def test_it_speaks_as_the_blocks_of_its_weights_say(gaps: Gaps, variant: str) -> None:
    """Fresh, and quantised anew at each sync. What is left is bfloat16. Over the latent cache, where two projections
    are one matrix and others are absorbed, and from DeepSeek's form of checkpoint alike."""
    for from_plain, from_quantised in gaps[variant][:3]:
        assert from_plain > 2e-2
        assert from_quantised < 8e-3
    assert gaps[variant][0] == gaps[variant][:3][-1]


def test_a_trainer_that_multiplies_in_fp8_is_nearer(gaps: Gaps) -> None:
    """Than one in bfloat16, though it rounds activations too."""
    in_bfloat16, in_fp8 = gaps[ROUNDED][-1]
    assert 2e-3 < in_fp8 < 0.8 * in_bfloat16


@needs_amx
def test_a_cache_in_fp8_is_off_by_its_rounding(gaps: Gaps) -> None:
    """In float32, where the engine agrees to 1e-5 without."""
    for from_plain, _ in gaps["cache"]:
        assert 2e-3 < from_plain < 5e-2
    assert gaps["cache"][0] == gaps["cache"][-1]


def test_weights_are_rounded_as_our_quantiser_does() -> None:
    """Whole blocks and others, alone those that vLLM quantises."""
    from rollout.cpu import rounded_to_fp8

    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("a.q_b_proj.weight", "mlp.experts.7.down_proj.weight", "a.kv_a_proj_with_mqa.weight"):
        rounded = rounded_to_fp8(name, weight)
        assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded, weight)
        torch.testing.assert_close(rounded, dequantise(quantise(weight, BLOCK)).bfloat16(), rtol=2**-7, atol=0)
    for name in ("mlp.gate.weight", "lm_head.weight", "q_a_layernorm.weight"):
        assert rounded_to_fp8(name, weight) is weight


def test_the_head_of_a_reward_model_stays_in_its_own_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of one row fits no block of 128 x 128; vLLM's own rules (quantization/online/base.py) decide by name."""
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    asked: dict[str, Any] = {}
    monkeypatch.setattr("rollout.pooling.LLM", lambda **arguments: asked.update(arguments))
    monkeypatch.setattr("rollout.pooling._refuse_rounding", lambda _: None)
    monkeypatch.setattr("rollout.pooling.engine_arguments", lambda *_, **__: {"quantization": "fp8_per_block"})
    ScoreEngine(tmp_path, RolloutConfig(max_model_len=64, fp8=["weights"], threads=1), "bfloat16", batch_tokens=64)
    resolved = resolve_quantization_config(asked["quantization"], asked["quantization_config"])
    assert resolved is not None
    rules = OnlineQuantizationConfig(resolved)
    assert rules.resolve_quant_method_cls(ReplicatedLinear, "score") is None
    assert rules.resolve_quant_method_cls(ReplicatedLinear, "model.layers.0.mlp.down_proj") is not None


@pytest.mark.skipif(AMX, reason="with AMX vLLM multiplies in FP8")
def test_a_reward_model_in_fp8_is_refused_where_the_cpu_would_compute_in_bfloat16(tmp_path: Path) -> None:
    config = RolloutConfig(max_model_len=64, fp8=["weights"], threads=1)
    with pytest.raises(ValueError, match="need a GPU, or a CPU with AMX"):
        ScoreEngine(tmp_path, config, "bfloat16", batch_tokens=64)
