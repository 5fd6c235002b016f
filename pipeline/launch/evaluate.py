"""Evaluation, put together: suites, engines, table."""

from pathlib import Path

from rich.console import Console

from configs.evaluation import EvalConfig
from configs.stages import Recipe
from pipeline.cluster.start import start_all, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.evaluation.suites import results_table
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.alarms import CUT_SHORT, TRUNCATED_RATE
from pipeline.stages import evaluate
from pipeline.weights.resolve import check_template, resolve_model


def check(config: EvalConfig) -> None:
    """Raise ValueError for a template, source, text or reward that isn't there."""
    check_template(config.model)
    check_suites(config.suites, config.reward_pool)


def launch(config: EvalConfig, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    """Evaluate into `folder`; the figures, named `SUITE/FIGURE`."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    evaluation = Evaluation.prepare(config.suites, tokenizer, config.reward_pool, config.seed)
    ends, dtype = turn_ends(tokenizer), config.model.dtype
    with start_all(lambda: start_rollout(model, config.rollout, dtype=dtype, seed=config.seed, ends=ends)) as (
        rollout,
    ):
        results = evaluate.run(config, evaluation, rollout, folder)
    console = Console()
    console.print(results_table(results))
    for suite, result in results.items():
        if result.figures.get("truncated_rate", 0.0) > TRUNCATED_RATE and not config.sampling.ignore_eos:
            console.print(f"{suite}: {CUT_SHORT}", markup=False)
    return {f"{suite}/{figure}": value for suite, result in results.items() for figure, value in result.figures.items()}
