"""From a recipe to runs on disk: stages in order, each finished one reused, each killed one resumed."""

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from configs.data import PromptData
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.stages import EvalConfig, GRPOConfig, Recipe, SFTConfig, StageConfig, TaskSuite
from pipeline.checkpoints import Checkpoints
from pipeline.data.conversations import Conversations
from pipeline.data.prompts import Prompts
from pipeline.data.rows import BadRows, source_files
from pipeline.errors import RunStopped
from pipeline.evaluation.suites import results_table
from pipeline.fleet import Fleet, cluster, start_all, start_policy, start_rewards, start_rollout
from pipeline.folder import write_atomic
from pipeline.lineage import check_lineage, write_lineage
from pipeline.models.load import resolve_model
from pipeline.models.tokenizer import load_tokenizer
from pipeline.report import Report
from pipeline.report_html import write_html
from pipeline.stages import evaluate, grpo, sft
from pipeline.sync import probe_sequences
from pipeline.train.engine import TrainSpec
from rewards.guard import inspect, refuse_idle, unjudgeable
from rewards.types import RewardsUnavailable
from rollout.pool import RolloutError

FIGURES = "figures.json"
"""Written when a stage is done: an evaluation's results, or a training's last metrics."""


def run_recipe(recipe: Recipe) -> None:
    """Run the stages in order on one cluster. A finished stage is skipped, an unfinished one continues.

    Raises ValueError for bad input, RunStopped where a stage stopped itself.
    """
    folder = (Path(recipe.runs_dir) / recipe.name).resolve()  # ranks have a working directory of their own
    for stage in recipe.stages.values():
        _check_inputs(stage)
    with cluster():
        for name, stage in recipe.stages.items():
            _run(name, stage, folder / name)


def run_stage(config: StageConfig, folder: Path) -> dict[str, float]:
    """Run one stage into `folder` and return its figures; see run_recipe."""
    _check_inputs(config)
    with cluster():
        return _run(folder.name, config, folder.resolve())


def _check_inputs(config: StageConfig) -> None:
    """Raise ValueError for a source, reward or template that isn't there, before anything starts."""
    if config.model.chat_template is not None and not Path(config.model.chat_template).is_file():
        raise ValueError(f"model.chat_template='{config.model.chat_template}' is no file")
    if isinstance(config, SFTConfig):
        data = [config.data, *([config.eval_data] if config.eval_data else [])]
    elif isinstance(config, GRPOConfig):
        data = [config.prompts]
        refuse_idle(config.reward_pool, inspect(config.rewards, config.reward_pool).values())
    else:
        suites = [suite for suite in config.suites.values() if isinstance(suite, TaskSuite)]
        data = [suite.prompts for suite in suites]
        inspected = [inspect([suite.reward], config.reward_pool) for suite in suites]
        refuse_idle(config.reward_pool, [pool for pools in inspected for pool in pools.values()])
        for name, suite in config.suites.items():
            if not isinstance(suite, TaskSuite) and not Path(suite.path).is_file():
                raise ValueError(f"suites.{name}.path='{suite.path}' is no file")
    for part in data:
        source_files(part.source)


def _run(name: str, config: StageConfig, folder: Path) -> dict[str, float]:
    """One stage, or its figures where it is done already. Raises ValueError where `folder` holds another one's run."""
    console = Console()
    model = resolve_model(config.model, run_folder=folder.parent, workdir=folder)
    check_lineage(folder, config, model)
    if (folder / FIGURES).is_file():
        console.print(f"[dim]{name}: done before, reused ({folder})")
        return json.loads((folder / FIGURES).read_text())
    console.rule(f"[bold]{name}[/] ({config.type})")
    write_lineage(folder, name, config, model)
    try:
        figures = _start(config, model, folder)
    except (RolloutError, RewardsUnavailable) as error:
        raise RunStopped(f"{name} stopped itself: {error}") from error
    write_html(folder)
    write_atomic(folder / FIGURES, json.dumps(figures, indent=1, sort_keys=True))
    return figures


def _start(config: StageConfig, model: Path, folder: Path) -> dict[str, float]:
    if isinstance(config, SFTConfig):
        return _sft(config, model, folder)
    if isinstance(config, GRPOConfig):
        return _grpo(config, model, folder)
    return _evaluate(config, model, folder)


def _sft(config: SFTConfig, model: Path, folder: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(model, config.model.chat_template)
    data = Conversations.load(config.data, tokenizer, folder / "data", config.seed)
    held_out = None
    if config.eval_data is not None:
        held_out = Conversations.load(config.eval_data, tokenizer, folder / "data", config.seed)
        if len(held_out) < config.trainer.num_ranks:
            raise ValueError(f"eval_data has {len(held_out)} rows for trainer.num_ranks={config.trainer.num_ranks}")
    steps = config.steps or -(-len(data) * (config.epochs or 1) // config.conversations_per_step)
    spec = _train_spec(config, model, steps)
    with start_all(lambda: start_policy(spec)) as (policy,), Report(folder, total_steps=steps, label="sft") as report:
        checkpoints = Checkpoints(folder, config.checkpoint, policy)
        report.resume(checkpoints.restore())
        _tell(data.bad_rows, folder / "bad_rows.jsonl", report.note)
        if held_out is not None:
            _tell(held_out.bad_rows, folder / "eval_bad_rows.jsonl", report.note)
        sft.run(config, steps, data, held_out, policy, checkpoints, report)
    return report.last_metrics


def _train_spec(config: SFTConfig | GRPOConfig, model: Path, total_steps: int) -> TrainSpec:
    objective = config.objective if isinstance(config, GRPOConfig) else None
    return TrainSpec(
        model,
        config.model.dtype,
        config.trainer,
        config.optimizer,
        total_steps,
        chat_template=config.model.chat_template,
        objective=objective,
        with_reference=objective is not None and objective.kl_coef > 0,
    )


def _tell(bad_rows: BadRows, file: Path, say: Callable[[str], None]) -> None:
    """Bad rows are said and kept, never just dropped."""
    if bad_rows.counts:
        say(bad_rows.summary())
        bad_rows.write(file)


def _prompts(
    data: PromptData,
    rewards: list[RewardSpec],
    pool: RewardPoolConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> Prompts:
    """The prompts that can be judged; the others are bad rows."""
    prompts = Prompts.load(data, tokenizer, seed)
    tasks = [prompt.task for prompt in prompts]
    return prompts.without(unjudgeable(rewards, pool, tasks), data.max_bad_share)


def _grpo(config: GRPOConfig, model: Path, folder: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(model, config.model.chat_template)
    prompts = _prompts(config.prompts, config.rewards, config.reward_pool, tokenizer, config.seed)
    spec = _train_spec(config, model, config.steps * config.updates_per_batch)
    starts = (
        lambda: start_rollout(model, config.rollout, dtype=config.model.dtype, seed=config.seed),
        lambda: start_policy(spec),
        lambda: start_rewards(config.rewards, config.reward_pool),
    )
    with (
        start_all(*starts) as (rollout, policy, rewards),
        Report(folder, total_steps=config.steps, label="grpo") as report,
    ):
        checkpoints = Checkpoints(folder, config.checkpoint, policy)
        report.resume(checkpoints.restore())
        _tell(prompts.bad_rows, folder / "bad_rows.jsonl", report.note)
        probe = probe_sequences(len(tokenizer), config.sync.probe_prompts, max_model_len=config.rollout.max_model_len)
        grpo.run(config, prompts, Fleet(policy, rollout, rewards, checkpoints, config, probe), report)
    return report.last_metrics


def _evaluate(config: EvalConfig, model: Path, folder: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(model, config.model.chat_template)
    tasks = {name: suite for name, suite in config.suites.items() if isinstance(suite, TaskSuite)}
    prompts = {
        name: _prompts(suite.prompts, [suite.reward], config.reward_pool, tokenizer, config.seed)
        for name, suite in tasks.items()
    }
    console = Console()
    for name, loaded in prompts.items():
        _tell(loaded.bad_rows, folder / f"{name}.bad_rows.jsonl", lambda text: console.print(text, markup=False))
    with start_all(lambda: start_rollout(model, config.rollout, dtype=config.model.dtype, seed=config.seed)) as (
        rollout,
    ):
        results = evaluate.run(config, prompts, tokenizer, rollout, folder)
    console.print(results_table(results))
    return {f"{suite}/{figure}": value for suite, result in results.items() for figure, value in result.figures.items()}
