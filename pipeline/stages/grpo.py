"""Group relative policy optimization: a completion's baseline is the mean reward of its group, without a critic
(DeepSeekMath section 4, arXiv:2402.03300; DeepSeek-V2 section 4.2, arXiv:2405.04434)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from configs.distill import DistillConfig
from configs.evaluation import fit_suites
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.sft import MtpConfig
from pipeline.cluster.start import start_all, start_ranks, start_rewards, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.data.order import refuse_repeats
from pipeline.data.prompts import Prompts, judgeable
from pipeline.data.rows import check_files, report_bad_rows
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.grpo.batches import training_batches
from pipeline.grpo.collect import collect
from pipeline.grpo.experience import Experience
from pipeline.grpo.figures import over_updates
from pipeline.grpo.fleet import Fleet
from pipeline.grpo.reference import reference_checkpoint
from pipeline.grpo.sync import probe_sequences
from pipeline.grpo.validation import Validation
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.alarms import Alarms
from pipeline.reports.report import Report, Sample, read_metrics
from pipeline.stages.context import Context
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.weights.resolve import check_adapters, check_template, resolve_model
from rewards.pool.guard import Judges, inspect, refuse_idle_workers
from rollout.checkpoint import mtp_depth


def run(
    config: GRPOConfig,
    prompts: Prompts,
    fleet: Fleet,
    report: Report,
    alarms: Alarms,
    validate: Callable[[int], dict[str, float]],
) -> None:
    """Run the remaining steps: sample G completions of each prompt, judge them, center their rewards within the group,
    update the policy, and send its weights to the engines."""
    for step in fleet.steps():
        experience = collect(config, prompts, fleet, step)
        moves = fleet.give_devices_to_ranks()
        batches = [fleet.prepare(batch) for batch in training_batches(experience, config, step, fleet.coefficients)]
        updates = [fleet.update(batch) for batch in batches]
        fleet.checkpoints.write(step)
        fleet.refresh_reference(step)
        metrics = experience.metrics | moves | over_updates(updates) | alarms.length_controlled(experience.metrics)
        metrics |= fleet.adapt_coefficients(metrics) | fleet.sync_weights(step) | validate(step)
        expert_load = fleet.policy.expert_load() if report.page_due(step) else None
        report.step(step, metrics | fleet.lap(), report_samples(experience), expert_load=expert_load)
        fleet.checkpoints.done(step)
        alarms.check(step, metrics)


def launch(config: GRPOConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the prompts, start ranks, engines and judges, and train into `folder`. Returns the last step's metrics."""
    model = resolve_model(config.model, workdir=folder, copy_fp8=True)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    with Judges(config.rewards, config.reward_pool) as judges:
        prompts = judgeable(config.prompts, judges, tokenizer, config.seed)
    refuse_repeats("prompts_per_step", config.prompts_per_step, len(prompts))
    gate = context.validation_gate
    suites = validation_suites(config, gate, tokenizer) if gate else None
    reference = reference_checkpoint(folder, model, config.objective.reference_every_steps)
    starts = (
        partial(
            start_rollout,
            model,
            config.rollout,
            dtype=config.model.dtype,
            seed=config.seed,
            stop_token_ids=turn_ends(tokenizer),
            with_routes=config.routing_replay == "rollout",
            with_kept=config.sampling.is_truncated,
        ),
        partial(start_ranks, replace(train_spec(config, model), reference=reference)),
        partial(start_rewards, config.rewards, config.reward_pool, judges.placements),
    )
    with (
        start_all(*starts) as (rollout, policy, rewards),
        Report(folder, total_steps=config.steps, label="grpo", report_to=context.report_to) as report,
    ):
        validates = config.validates if gate else lambda _: False
        checkpoints = Checkpoints(folder, config.checkpoint, policy, last_step=config.steps, is_candidate=validates)
        report.resume(checkpoints.restore())
        report_bad_rows(prompts.bad_rows, folder / "bad_rows.jsonl", report.note)
        alarms = Alarms(config, report.note)
        rows = read_metrics(folder)
        alarms.resume(rows)
        validation = None
        if gate and suites:
            validation = Validation(gate, suites, rollout, checkpoints, folder / "validation", validates)
        text = chain.from_iterable(prompt.token_ids for prompt in prompts)
        probe = probe_sequences(len(tokenizer), max_model_len=config.rollout.max_model_len, text=text)
        handles = {"policy": policy, "rollout": rollout, "rewards": rewards}
        fleet = Fleet(**handles, checkpoints=checkpoints, config=config, folder=folder, probe=probe)
        fleet.resume(rows)
        run(config, prompts, fleet, report, alarms, validation.figures if validation else lambda _: {})
    return report.last_metrics


def check(config: GRPOConfig) -> None:
    """Raise ValueError for a chat template, source or reward that does not exist, and for adapters that don't fit."""
    check_template(config.model)
    check_adapters(config.lora)
    check_files(config.prompts.source)
    refuse_idle_workers(config.reward_pool, inspect(config.rewards, config.reward_pool).values())


def report_samples(experience: Experience) -> list[Sample]:
    """Convert each completion of the experience into a sample for the report."""
    return [
        Sample(group.prompt.task.prompt, completion.text, completion.finish_reason, float(reward), verdicts)
        for group, rewards_G in zip(experience.groups, experience.rewards_PG, strict=True)
        for completion, verdicts, reward in zip(group.group.completions, group.verdicts, rewards_G, strict=True)
    ]


def train_spec(config: GRPOConfig, model: Path) -> TrainSpec:
    """Return the specification of the training ranks, which start from the checkpoint `model`."""
    return TrainSpec(
        model,
        config.model.dtype,
        config.trainer,
        config.optimizer,
        config.steps * config.updates_per_batch,
        chat_template=config.model.chat_template,
        objective=config.objective,
        with_reference=config.objective.kl_coef > 0,
        routing_replay=config.routing_replay != "none",
        mtp=detached_mtp(config.mtp_weight, model),
        lora=config.lora,
    )


def validation_suites(
    config: GRPOConfig | DistillConfig, gate: GateConfig, tokenizer: PreTrainedTokenizerFast
) -> Evaluation:
    """Prepare the suites of `gate` that the stage's own engines run while it trains. These hold its own policy, so
    suites that compare with other checkpoints are left out. Raises ValueError as `check_validation`."""
    check_validation(config, gate)
    own_suites = {name: suite for name, suite in gate.suites.items() if not suite.checkpoints()}
    return Evaluation.prepare(own_suites, tokenizer, gate.reward_pool, gate.seed, start_rewards)


def check_validation(config: GRPOConfig | DistillConfig, gate: GateConfig) -> None:
    """Raise ValueError for a gate whose suites these engines can't run, or whose files, rewards or tasks do not
    exist."""
    if config.rollout.max_model_len < gate.rollout.max_model_len:
        raise ValueError(
            f"rollout.max_model_len={config.rollout.max_model_len} is less than the {gate.rollout.max_model_len} that "
            "the gate in validation.gate sets for its suites; raise it, or lower the gate's"
        )
    truncated = isinstance(config, GRPOConfig) and config.sampling.is_truncated
    if truncated and gate.sampling.temperature and not gate.sampling.top_k:
        raise ValueError(
            "the gate in validation.gate has no sampling.top_k, which engines that record the kept tokens of "
            "sampling.top_k and sampling.top_p need; set it there, or its temperature to 0"
        )
    decisive = gate.rules[0].figure
    if gate.suites[decisive.partition("/")[0]].checkpoints():
        raise ValueError(
            f"rules.0.figure='{decisive}' of the gate in validation.gate compares with another checkpoint, which can't "
            "answer while this stage trains; put another rule first, or give the suite's baseline as a file of answers"
        )
    fit_suites(gate.suites, gate.sampling, config.rollout)
    check_suites(gate.suites, gate.reward_pool)


def detached_mtp(weight: float, model: Path) -> MtpConfig | None:
    """Return the settings that train the multi-token prediction modules of `model` with the policy; None for weight 0.

    Raises ValueError for a checkpoint without such modules, since new ones should not start from sampled text.
    """
    if not weight:
        return None
    depth = mtp_depth(model)
    if not depth:
        raise ValueError(
            f"mtp_weight={weight} has no effect on '{model}', which has no modules for multi-token prediction; remove "
            "it, or give the checkpoint some in an sft stage with `mtp`"
        )
    return MtpConfig(weight=weight, depth=depth, detached=True)
