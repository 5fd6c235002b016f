"""Coefficients that follow a target."""

import numpy as np
import pytest

from configs.grpo import GRPOConfig
from pipeline.data.prompts import Prompt
from pipeline.grpo.batches import training_batches
from pipeline.grpo.experience import Experience, JudgedGroup
from pipeline.objectives.control import adapted_kl_coef
from rewards.types import Task
from rollout.types import Completion, Group
from tests.configs.test_grpo import SETTINGS


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
    config = GRPOConfig.model_validate(SETTINGS | {"prompts_per_step": 1, "objective": {"kl_target": 0.1}})
    group = Group(0, [5], [Completion([token], [-0.1], "", "stop", 0) for token in (6, 7)])
    experience = Experience([JudgedGroup(Prompt([5], Task("", None)), group, [])], np.array([[1.0, 0.0]]), {})
    (batch,) = training_batches(experience, config, 1, kl_coef=0.07)
    assert [branch.columns["kl_coef"] for branch in batch.trees[0].branches] == [[0.07], [0.07]]
