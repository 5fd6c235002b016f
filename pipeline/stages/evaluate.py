"""Evaluation of a checkpoint on suites, through the same engines that sample rollouts."""

from functools import partial
from pathlib import Path

from rich.console import Console

from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.model import ModelConfig
from pipeline.cluster.start import start_all, start_rewards, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.alarms import CUT_SHORT, TRUNCATED_RATE
from pipeline.stages.context import Context
from pipeline.weights.resolve import check_template, resolve_model


def run(config: EvalConfig | GateConfig, model: ModelConfig, checkpoint: Path, folder: Path) -> dict[str, SuiteResult]:
    """Evaluate `checkpoint`, with the chat template and dtype of `model`, on every suite in turn.

    Starts engines for this checkpoint only, since the next may have another architecture. Returns the results by suite;
    `folder` keeps their records.
    """
    tokenizer = load_tokenizer(checkpoint, model.chat_template)
    evaluation = Evaluation.prepare(config.suites, tokenizer, config.reward_pool, config.seed, start_rewards)
    start = partial(start_rollout, dtype=model.dtype, seed=config.seed, stop_token_ids=turn_ends(tokenizer))
    with start_all(lambda: start(checkpoint, config.rollout)) as (rollout,):
        return evaluation.run(rollout, config.sampling, config.seed, folder)


def launch(config: EvalConfig, folder: Path, context: Context) -> dict[str, float]:
    """Evaluate into `folder`. Returns the figures, named `SUITE/FIGURE`."""
    results = run(config, config.model, resolve_model(config.model, workdir=folder, keep_fp8=True), folder)
    console = Console()
    console.print(results_table(results))
    for suite, result in results.items():
        if result.figures.get("truncated_rate", 0.0) > TRUNCATED_RATE and not config.sampling.ignore_eos:
            console.print(f"{suite}: {CUT_SHORT}", markup=False)
    return {f"{suite}/{figure}": value for suite, result in results.items() for figure, value in result.figures.items()}


def check(config: EvalConfig) -> None:
    """Raise ValueError for a chat template, source, text or reward that does not exist."""
    check_template(config.model)
    check_suites(config.suites, config.reward_pool)
