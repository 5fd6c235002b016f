"""Collect the experience of one GRPO step: sample groups of completions, judge them and mix their rewards.

Each group goes to the judges as soon as it is complete, while the engines still sample the others.

Shape suffixes: P prompts, G completions of a prompt, K rewards.
"""

import numpy as np
from numpy.typing import NDArray

from configs.grpo import GRPOConfig
from pipeline.data.prompts import Prompt, Prompts
from pipeline.grpo.experience import Experience, JudgedGroup
from pipeline.grpo.figures import length_slope, reward_figures, rollout_figures
from pipeline.grpo.fleet import Fleet
from pipeline.grpo.mix import DECIMALS, mix, mix_metrics, shape_overlong
from pipeline.objectives.advantage import Array, has_spread
from rewards.types import Verdict
from rollout.types import StoredGroup


def collect(config: GRPOConfig, prompts: Prompts, fleet: Fleet, step: int) -> Experience:
    """Sample and judge until P groups have spread, or until the rounds of dynamic sampling are used up (DAPO, section
    3.2, arXiv:2503.14476). Always returns P groups, those with spread first.

    The number of the round selects the prompts and the sampling seed, so that a resumed run repeats it. Rewards are
    mixed, and metrics computed, over all sampled groups. The engines are awake. Raises RolloutError or
    RewardsUnavailable.
    """
    num_prompts, max_rounds = config.prompts_per_step, config.dynamic_sampling.max_rounds
    sampled: list[JudgedGroup] = []
    rewards_PG = totals_PG = np.empty((0, config.group_size))
    spread_P = np.empty(0, bool)
    metrics: dict[str, float] = {}
    with fleet.watch("generate"):
        for draw in range((step - 1) * max_rounds + 1, step * max_rounds + 1):
            sampled += _sample(config, prompts.take(draw, num_prompts), fleet, seed=draw_seed(config.seed, draw))
            lengths_PG = np.array([group.lengths_G for group in sampled])
            rewards_PG, totals_PG, metrics = mixed_rewards(config, [group.verdicts for group in sampled], lengths_PG)
            spread_P = has_spread(rewards_PG)
            if spread_P.sum() >= num_prompts:
                break
    rows = np.argsort(~spread_P, kind="stable")[:num_prompts]
    completions = [completion for group in sampled for completion in group.group.completions]
    metrics |= reward_figures(totals_PG) | rollout_figures(completions)
    metrics |= {
        "rollout/sampled_groups": float(len(spread_P)),
        "rollout/mixed_groups_rate": float(spread_P.mean()),
    }
    metrics |= fleet.rewards.metrics() | fleet.rollout.metrics()
    return Experience([sampled[row] for row in rows], rewards_PG[rows], metrics)


def draw_seed(seed: int, draw: int) -> int:
    """Return the sampling seed of a draw of prompts, so that a resumed run repeats it."""
    return seed * 1_000_003 + draw


def _sample(config: GRPOConfig, prompts: list[Prompt], fleet: Fleet, *, seed: int) -> list[JudgedGroup]:
    groups: dict[int, StoredGroup] = {}
    prompt_ids = [prompt.token_ids for prompt in prompts]
    for group in fleet.rollout.generate(prompt_ids, config.sampling, config.group_size, seed):
        groups[group.index] = group
        task = prompts[group.index].task
        fleet.rewards.submit(group.index, task, [completion.text for completion in group.completions])
    verdicts = fleet.rewards.gather()
    return [JudgedGroup(prompt, groups[i], verdicts[i]) for i, prompt in enumerate(prompts)]


def mixed_rewards(
    config: GRPOConfig, verdicts: list[list[dict[str, Verdict]]], lengths_PG: NDArray[np.int64]
) -> tuple[Array, Array, dict[str, float]]:
    """Mix the verdicts and add the penalty of overlong completions.

    Returns rewards_PG; totals_PG, the same before normalisation, which would make every step's reported mean 0; and
    metrics of the mix.
    """
    mixed = mix(verdicts, config.rewards, normalize=config.mixing)
    penalty_PG = shape_overlong(
        lengths_PG, max_tokens=config.sampling.max_tokens, shaping_tokens=config.overlong.shaping_tokens
    )
    rewards_PG = np.round(mixed.rewards_PG + penalty_PG, DECIMALS)
    metrics = mix_metrics(mixed, lengths_PG)
    totals_PG = rewards_PG
    if config.mixing != "none":
        weights_K = np.array([spec.weight for spec in config.rewards])
        totals_PG = np.tensordot(weights_K, np.nan_to_num(mixed.capped_KPG), axes=1) + penalty_PG
        totals_PG[np.isnan(rewards_PG)] = np.nan
    slope = length_slope(totals_PG, lengths_PG)
    return rewards_PG, totals_PG, metrics if slope is None else metrics | {"reward/total/length_slope": slope}
