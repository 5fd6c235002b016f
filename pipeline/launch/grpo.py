"""GRPO, put together: prompts, engines, ranks, judges, report."""

from pathlib import Path

from configs.evaluation import refuse_unfit
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.sft import MtpConfig
from configs.stages import Recipe
from pipeline.cluster.start import start_all, start_policy, start_rewards, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.data.order import refuse_repeats
from pipeline.data.prompts import judgeable
from pipeline.data.rows import source_files, tell
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.gates.validation import Validation
from pipeline.grpo.fleet import Fleet
from pipeline.grpo.sync import probe_sequences
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.alarms import Alarms
from pipeline.reports.report import Report, read_metrics
from pipeline.run.stage import validating
from pipeline.stages import grpo
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.weights.resolve import check_template, resolve_model
from rewards.guard import inspect, refuse_idle_workers
from rollout.checkpoint import mtp_depth


def check(config: GRPOConfig) -> None:
    """Raise ValueError for a template, source or reward that isn't there."""
    check_template(config.model)
    source_files(config.prompts.source)
    refuse_idle_workers(config.reward_pool, inspect(config.rewards, config.reward_pool).values())


def launch(config: GRPOConfig, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    """Train into `folder`; the last step's metrics."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    prompts = judgeable(config.prompts, config.rewards, config.reward_pool, tokenizer, config.seed)
    refuse_repeats("prompts_per_step", config.prompts_per_step, len(prompts))
    gate = validation_gate(config, folder, recipe)
    suites = gate and Evaluation.prepare(gate.suites, tokenizer, gate.reward_pool, gate.seed)
    spec = TrainSpec(
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
    )
    starts = (
        lambda: start_rollout(
            model,
            config.rollout,
            dtype=config.model.dtype,
            seed=config.seed,
            ends=turn_ends(tokenizer),
            with_routes=config.routing_replay == "rollout",
        ),
        lambda: start_policy(spec),
        lambda: start_rewards(config.rewards, config.reward_pool),
    )
    with (
        start_all(*starts) as (rollout, policy, rewards),
        Report(folder, total_steps=config.steps, label="grpo") as report,
    ):
        checkpoints = Checkpoints(folder, config.checkpoint, policy)
        report.resume(checkpoints.restore())
        tell(prompts.bad_rows, folder / "bad_rows.jsonl", report.note)
        alarms = Alarms(config, report.note)
        alarms.resume(read_metrics(folder))
        validation = (
            Validation(config, gate, suites, rollout, checkpoints, folder / "validation") if gate and suites else None
        )
        probe = probe_sequences(len(tokenizer), max_model_len=config.rollout.max_model_len)
        fleet = Fleet(policy, rollout, rewards, checkpoints, config, probe)
        grpo.run(config, prompts, fleet, report, alarms, validation.figures if validation else lambda _: {})
    return report.last_metrics


def detached_mtp(weight: float, model: Path) -> MtpConfig | None:
    """How the modules for multi-token prediction that `model` has are trained beside the policy, None for weight 0.

    Raises ValueError for a checkpoint that has none: sampled text is a poor start for new ones.
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


def validation_gate(config: GRPOConfig, folder: Path, recipe: Recipe | None) -> GateConfig | None:
    """The gate that `config.validation` names, in the recipe or as a file; None where nothing is validated.

    Raises ValueError for a file, reward or task that isn't there, and for suites that these engines can't run.
    """
    by = validating(config, folder, recipe)
    if config.validation is None or by is None:
        return None
    name, gate = config.validation.gate, by.runnable
    if config.rollout.max_model_len < gate.rollout.max_model_len:
        raise ValueError(
            f"rollout.max_model_len={config.rollout.max_model_len} is less than the {gate.rollout.max_model_len} that "
            f"the suites of validation.gate='{name}' are made for; raise it, or lower the gate's"
        )
    refuse_unfit(gate.suites, gate.sampling, config.rollout)
    check_suites(gate.suites, gate.reward_pool)
    return gate
