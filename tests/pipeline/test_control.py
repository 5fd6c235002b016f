"""Coefficients that follow a target."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.grpo import GRPOConfig, ObjectiveConfig
from pipeline.data.prompts import Prompt
from pipeline.grpo.batches import training_batches
from pipeline.grpo.experience import Experience, JudgedGroup
from pipeline.grpo.fleet import Fleet
from pipeline.objectives.control import Coefficients, adapted_entropy_coef, adapted_kl_coef
from pipeline.objectives.policy import PolicyTokens, entropy_term, grpo_loss
from rewards.types import Task
from rollout.types import Completion, Group
from tests.pipeline.sharding import stored
from tests.settings import GRPO


def test_beta_follows_the_divergence_by_hand() -> None:
    """At 1.1 times the target e = 0.1, so beta grows by 1 %; at twice or half of it, e is cut to 0.2 and -0.2."""
    divergences = (0.1, 0.11, 0.2, 0.05, 0.0)
    betas = [adapted_kl_coef(0.04, divergence=divergence, target=0.1) for divergence in divergences]
    assert betas == pytest.approx([0.04, 0.0404, 0.0408, 0.0392, 0.0392])


def test_beta_settles_where_the_divergence_is_the_target() -> None:
    """A divergence of 0.004 / beta is the target of 0.1 at beta 0.04, from either side."""
    for beta in (0.01, 0.3):
        for _ in range(300):
            beta = adapted_kl_coef(beta, divergence=0.004 / beta, target=0.1)
        assert beta == pytest.approx(0.04, rel=1e-3)


def test_the_beta_of_a_step_reaches_its_tokens() -> None:
    config = GRPOConfig.model_validate(GRPO | {"prompts_per_step": 1, "objective": {"kl_target": 0.1}})
    group = Group(0, [5], [Completion([token], [-0.1], "", "stop", 0) for token in (6, 7)])
    experience = Experience(
        [JudgedGroup(Prompt([5], Task("", None)), stored(group), [])],
        np.array([[1.0, 0.0]]),
        {"rollout/entropy_mean": 0.5},
    )
    (batch,) = training_batches(experience, config, 1, Coefficients(kl=0.07, entropy=0.01))
    for branch in batch.trees[0].branches:
        columns = {name: branch.columns[name] for name in ("kl_coef", "entropy_coef", "entropy_baseline")}
        assert columns == {"kl_coef": [0.07], "entropy_coef": [0.01], "entropy_baseline": [0.5]}


def test_the_entropys_coefficient_by_hand() -> None:
    """Below the target of 0.3 nats it grows by 0.001, above it falls by as much, and it is never negative."""
    values = [(0.002, 0.1), (0.002, 0.5), (0.0004, 0.5), (0.0, 0.5)]
    coefficients = [adapted_entropy_coef(coef, entropy=entropy, target=0.3) for coef, entropy in values]
    assert coefficients == pytest.approx([0.003, 0.001, 0.0, 0.0])


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_entropy_term_has_the_gradient_of_the_entropy(baseline: float) -> None:
    """Each token of a vocabulary of four, with the weight of its probability under another policy: the gradient is
    -p (log p + H) for each logit, with p of the present policy, whatever the baseline."""
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    old_V = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    logprobs_V = logits_V.log_softmax(0)
    ratio_V = (logprobs_V - old_V.log()).exp()
    term_V = entropy_term(ratio_N=ratio_V, logprobs_N=logprobs_V, baseline_N=torch.full_like(old_V, baseline))
    (gradient_V,) = torch.autograd.grad((old_V * term_V).sum(), logits_V)
    p_V, log_V = logits_V.detach().softmax(0), logits_V.detach().log_softmax(0)
    torch.testing.assert_close(gradient_V, -p_V * (log_V - (p_V * log_V).sum()))


def test_the_loss_with_entropy_by_hand() -> None:
    """One token of probability e^-1, advantage 0, ratio 1: the term is 0.1 (1 - 0.4) = 0.06, so the loss is -0.06."""
    one, zero = torch.ones(1), torch.zeros(1)
    tokens = PolicyTokens(-one, -one, -one, None, zero, one, torch.zeros(1, dtype=torch.int64), 1)
    tokens = tokens._replace(entropy_coef_N=0.1 * one, entropy_baseline_N=0.4 * one)
    assert grpo_loss(tokens, ObjectiveConfig(kl_coef=0.0), denominator=1.0).loss.item() == pytest.approx(-0.06)


def fleet_of(objective: dict[str, float]) -> Fleet:
    """A fleet without workers."""
    config = GRPOConfig.model_validate(GRPO | {"objective": objective})
    nobody: Any = None
    handles = dict.fromkeys(("policy", "rollout", "rewards", "checkpoints"), nobody)
    return Fleet(**handles, config=config, folder=Path("stage"), probe=[])


@pytest.mark.parametrize(
    "objective",
    [
        {"kl_target": 0.1, "kl_coef": 0.05},
        {"entropy_target": 0.3, "entropy_coef": 0.002},
        {"kl_target": 0.1, "entropy_target": 0.3},
        {"entropy_coef": 0.01},
        {},
    ],
)
def test_a_resumed_run_continues_with_its_coefficients(objective: dict[str, float]) -> None:
    """To the bit, from what was recorded in JSON after any step."""
    whole = fleet_of(objective)
    whole.resume([])
    rows: list[dict[str, float]] = []
    for step in range(1, 6):
        metrics = {"loss/kl_mean": 0.3 / step, "rollout/entropy_mean": 0.1 * step}
        rows.append(json.loads(json.dumps(metrics | whole.adapt_coefficients(metrics))))
        resumed = fleet_of(objective)
        resumed.resume(rows)
        assert resumed.coefficients == whole.coefficients
    first = Coefficients(objective.get("kl_coef", 0.04) if "kl_target" in objective else None)
    first = first._replace(entropy=objective.get("entropy_coef", 0.0))
    adapts = "kl_target" in objective or "entropy_target" in objective
    assert (whole.coefficients != first) == adapts
