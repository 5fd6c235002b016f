"""Presets of the objective, each against its paper's formula, one completion and one token at a time."""

import numpy as np
import pytest
import torch

from configs.grpo import PRESETS, ObjectiveConfig
from pipeline.objectives.advantage import group_advantage, leave_one_out_advantage
from pipeline.objectives.aggregate import batch_denominator, token_weight
from pipeline.objectives.policy import PolicyTokens, grpo_loss

LENGTHS = [3, 5, 2, 6]
MAX_TOKENS = 8


def published(preset: str, logp: list, old: list, rollout: list, ref: list, rewards: list[float]) -> float:
    """-J of one group as the paper of `preset` prints it."""
    mean, std = np.mean(rewards), np.std(rewards)
    total = 0.0
    for i, length in enumerate(LENGTHS):
        ratios = np.exp(logp[i] - old[i])
        k3 = np.exp(ref[i] - logp[i]) - (ref[i] - logp[i]) - 1
        product = np.exp(np.sum(logp[i] - old[i]))
        product_ref = np.exp(np.sum(ref[i] - logp[i]))
        k3_completion = product_ref - np.log(product_ref) - 1
        a = (rewards[i] - mean) / std

        def clipped(r, a, low, high):
            return np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)

        match preset:
            case "deepseekmath":
                total += np.mean(clipped(ratios, a, 0.2, 0.2) - 0.04 * k3) / len(LENGTHS)
            case "deepseek_v2":
                total += (clipped(product, a, 0.2, 0.2) - 0.04 * k3_completion) / len(LENGTHS)
            case "deepseek_r1":
                total += (clipped(product, a, 10, 10) - 0.001 * k3_completion) / len(LENGTHS)
            case "deepseek_v32":
                a = rewards[i] - mean
                mask = 0.0 if a < 0 and np.mean(rollout[i] - logp[i]) > 0.1 else 1.0
                total += np.mean(clipped(ratios, a, 0.2, 0.2) * mask - 0.001 * ratios * k3) / len(LENGTHS)
            case "dapo":
                total += np.sum(clipped(ratios, a, 0.2, 0.28)) / sum(LENGTHS)
            case "dr_grpo":
                total += np.sum(clipped(ratios, rewards[i] - mean, 0.2, 0.2)) / MAX_TOKENS / len(LENGTHS)
            case "gspo":
                total += clipped(product ** (1 / length), a, 3e-4, 4e-4) / len(LENGTHS)
            case "cispo":
                total += np.sum(np.clip(ratios, 0, 5.0) * a * logp[i]) / sum(LENGTHS)
            case "rloo":
                a = rewards[i] - (sum(rewards) - rewards[i]) / (len(rewards) - 1)
                total += clipped(product, a, 0.2, 0.2) / len(LENGTHS)
    return -total


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_is_its_papers_formula(preset: str) -> None:
    rng = np.random.default_rng(3)
    rollout = [rng.normal(-1.0, 0.5, length) for length in LENGTHS]
    old = [x + rng.normal(0, 0.02, len(x)) for x in rollout]
    logp = [x + rng.normal(0, 0.2, len(x)) for x in old]
    ref = [x + rng.normal(0, 0.3, len(x)) for x in old]
    rewards = [1.0, 0.0, 0.5, 0.0]
    objective = ObjectiveConfig.model_validate({"preset": preset})
    rewards_PG = np.array([rewards])
    advantages = (
        leave_one_out_advantage(rewards_PG)
        if objective.baseline == "leave_one_out"
        else group_advantage(rewards_PG, normalize_std=objective.normalize_std)
    )[0]
    weights = [token_weight(objective.aggregation, length=n, max_tokens=MAX_TOKENS) for n in LENGTHS]
    tokens = PolicyTokens(
        *(torch.from_numpy(np.concatenate(x)) for x in (logp, old, rollout)),
        ref_logprobs_N=torch.from_numpy(np.concatenate(ref)) if objective.kl_coef else None,
        advantages_N=torch.from_numpy(np.repeat(advantages, LENGTHS)),
        weights_N=torch.from_numpy(np.repeat(weights, LENGTHS)),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS)),
        num_sequences=len(LENGTHS),
    )
    output = grpo_loss(tokens, objective, denominator=batch_denominator(objective.aggregation, LENGTHS))
    assert output.loss.item() == pytest.approx(published(preset, logp, old, rollout, ref, rewards), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"surrogate": "cispo", "ratio": "completion"}, "ratio=token"),
        ({"surrogate": "cispo", "clip_dual": 3.0}, "clip_dual"),
        ({"ratio": "completion", "aggregation": "token"}, "aggregation"),
        ({"kl": "unbiased", "ratio": "sequence"}, "ratio=token"),
        ({"baseline": "leave_one_out"}, "normalize_std=false"),
        ({"importance_cap": 2.0, "importance_floor": 0.5}, "importance_mode=mask"),
        ({"importance_level": "sequence"}, "importance_cap"),
        ({"kl_coef": 0.0, "kl": "unbiased"}, "kl_coef"),
        ({"preset": "dapo", "kl_coef_of": {"math": 0.1}}, "kl_coef"),
        ({"preset": "grpo2"}, "preset"),
    ],
)
def test_combinations_without_effect_are_refused(settings: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        ObjectiveConfig.model_validate(settings)


def test_keys_beside_a_preset_replace_its_own() -> None:
    objective = ObjectiveConfig.model_validate({"preset": "dapo", "clip_high": 0.3})
    assert (objective.clip_high, objective.aggregation, objective.kl_coef) == (0.3, "token", 0.0)
    assert ObjectiveConfig.model_validate(objective.model_dump()) == objective
