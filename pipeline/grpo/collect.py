"""Collect the experience of one GRPO step: sample groups of completions, judge them and mix their rewards.

Each group goes to the judges as soon as it is complete, while the engines still sample the others
(pipeline.grpo.draws).

Shape suffixes: P prompts, G completions of a prompt, K rewards.
"""

import numpy as np
from numpy.typing import NDArray

from configs.grpo import GRPOConfig
from pipeline.data.prompts import Prompts
from pipeline.grpo.draws import draws_of
from pipeline.grpo.experience import Experience, JudgedGroup
from pipeline.grpo.figures import lag_figures, length_slope, reward_figures, rollout_figures
from pipeline.grpo.fleet import Fleet
from pipeline.grpo.mix import DECIMALS, mix, mix_metrics, shape_overlong
from pipeline.objectives.advantage import Array, has_spread
from rewards.types import Verdict


def collect(config: GRPOConfig, prompts: Prompts, fleet: Fleet, step: int) -> Experience:
    """Sample and judge until P groups have spread, or until the rounds of dynamic sampling are used up (DAPO, section
    3.2, arXiv:2503.14476). Always returns P groups, those with spread first.

    The number of the round selects the prompts and the sampling seed, so that a resumed run repeats it. With
    `rollout.max_lag` the first round of later steps begins too (pipeline.grpo.draws). Rewards are mixed, and metrics
    computed, over all sampled groups. The engines are awake. Raises RolloutError or RewardsUnavailable.
    """
    num_prompts = config.prompts_per_step
    sampled: list[JudgedGroup] = []
    rewards_PG = totals_PG = np.empty((0, config.group_size))
    spread_P = np.empty(0, bool)
    metrics: dict[str, float] = {}
    with fleet.watch("generate"):
        fleet.draws.begin(prompts, step)
        for draw in draws_of(step, config):
            sampled += fleet.draws.judged(prompts, draw, step)
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
    if config.rollout.max_lag:
        metrics |= lag_figures(completions, version=step - 1)
        metrics["rollout/carried_tokens"] = float(fleet.rollout.carried_tokens)
        metrics["rollout/wasted_tokens"] = float(fleet.rollout.wasted_tokens)
    metrics |= fleet.rewards.metrics() | fleet.rollout.metrics()
    return Experience([sampled[row] for row in rows], rewards_PG[rows], metrics)


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
