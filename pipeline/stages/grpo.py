"""Group relative policy optimization (DeepSeekMath section 4, DeepSeek-V2 section 4.2): no critic, the baseline of a
completion is the mean reward of its group."""

from collections.abc import Callable

from configs.grpo import GRPOConfig
from pipeline.data.prompts import Prompts
from pipeline.grpo.experience import collect, over_updates, training_batches
from pipeline.grpo.fleet import Fleet
from pipeline.grpo.sync import check_spoken
from pipeline.reports.alarms import Alarms
from pipeline.reports.report import Report
from pipeline.reports.stopwatch import Stopwatch


def run(
    config: GRPOConfig,
    prompts: Prompts,
    fleet: Fleet,
    report: Report,
    alarms: Alarms,
    validate: Callable[[int], dict[str, float]],
) -> None:
    """Sample G answers a prompt, judge them, centre within the group, update, sync; `steps` times.

    Starts after the step the policy was restored at, and sends that policy to the engines first.
    """
    watch = Stopwatch()
    synced = fleet.sync_weights(fleet.checkpoints.step)
    for step in range(fleet.checkpoints.step + 1, config.steps + 1):
        with watch("generate"), fleet.rollout.awake():
            experience, metrics = collect(config, prompts, fleet, step)
        batches = training_batches(experience, config)
        with fleet.policy.awake():
            sharded = [fleet.policy.shard(batch.trees) for batch in batches]
            with watch("reference"):
                if config.objective.kl_coef > 0:
                    sharded = [fleet.policy.with_logprobs(rows, reference=True) for rows in sharded]
                if config.routing_replay == "policy":
                    sharded = [fleet.policy.with_routes(rows) for rows in sharded]
                elif config.updates_per_batch > 1:  # else the ratio's denominator is the forward pass of the update
                    sharded = [fleet.policy.with_logprobs(rows, reference=False) for rows in sharded]
            with watch("train"):
                updates = [
                    fleet.policy.update(rows, batch.denominator) for rows, batch in zip(sharded, batches, strict=True)
                ]
        metrics |= over_updates(updates) | alarms.length_controlled(metrics)
        for ranks, update in zip(sharded, updates, strict=True):
            num_tokens = sum(len(row.target_N) for rows in ranks for row in rows)
            check_spoken(update, num_tokens, synced["sync/bound_mean"], step=step)
        with watch("sync"):
            synced = fleet.sync_weights(step)
        metrics |= synced | validate(step)
        report.step(
            step,
            metrics | watch.lap(),
            experience.samples(),
            expert_load=fleet.policy.expert_load() if report.page_due(step) else None,
        )
        fleet.checkpoints.done(step, last=step == config.steps)
        alarms.check(step, metrics)
