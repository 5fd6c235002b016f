"""A reward model, put together: comparisons, ranks, report."""

from pathlib import Path

from rich.console import Console

from configs.reward_model import PairwiseLoss, PointwiseLoss, RewardModelConfig
from configs.stages import Recipe
from configs.train import num_steps
from pipeline.cluster.start import start_all, start_policy
from pipeline.data.comparisons import Comparison, Comparisons
from pipeline.data.order import refuse_repeats
from pipeline.data.rows import report_bad_rows, source_files
from pipeline.evaluation.comparisons import EVALUATION
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.report import Report
from pipeline.stages import reward_model
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.weights.resolve import check_template, resolve_model


def check(config: RewardModelConfig) -> None:
    """Raise ValueError for a template or source that isn't there."""
    check_template(config.model)
    for data in (config.data, *config.eval_data.values()):
        source_files(data.source)


def launch(config: RewardModelConfig, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    """Train into `folder`; the last step's metrics."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    data = Comparisons.load(config.data, tokenizer, config.seed)
    refuse_repeats("comparisons_per_step", config.comparisons_per_step, len(data))
    refuse_unfit(config.loss, data)
    held_out = {name: Comparisons.load(each, tokenizer, config.seed) for name, each in config.eval_data.items()}
    steps = num_steps(config.steps, config.epochs, rows=len(data), rows_per_step=config.comparisons_per_step)
    spec = TrainSpec(
        model,
        config.model.dtype,
        config.trainer,
        config.optimizer,
        steps,
        chat_template=config.model.chat_template,
        objective=config.loss,
        head_seed=config.seed,
    )
    with start_all(lambda: start_policy(spec)) as (policy,), Report(folder, total_steps=steps, label="rm") as report:
        checkpoints = Checkpoints(folder, config.checkpoint, policy)
        report.resume(checkpoints.restore())
        report_bad_rows(data.bad_rows, folder / "bad_rows.jsonl", report.note)
        for name, each in held_out.items():
            report_bad_rows(each.bad_rows, folder / f"{name}.bad_rows.jsonl", report.note)
        results = reward_model.run(config, steps, data, held_out, policy, checkpoints, report, folder / EVALUATION)
    if results:
        Console().print(results_table({name: SuiteResult(result.figures) for name, result in results.items()}))
    return report.last_metrics


def refuse_unfit(loss: PairwiseLoss | PointwiseLoss, data: Comparisons) -> None:
    """Raise ValueError, naming the first row, for comparisons that the loss can learn nothing from, and for a margin
    that no row has scores for."""
    rows = [data[index].comparison for index in range(len(data))]
    unfit = [row for row in rows if _unfit(loss, row)]
    if unfit:
        remedy = {
            "pairwise": "it needs two answers or more with an order; drop the others, or set loss.type=pointwise",
            "pointwise": "it needs a score for every answer, for kind 'bce' between 0 and 1",
        }[loss.type]
        raise ValueError(f"loss.type={loss.type} can't learn from {len(unfit)} rows of data ({unfit[0].row}): {remedy}")
    if isinstance(loss, PairwiseLoss) and loss.margin and all(row.scores is None for row in rows):
        raise ValueError(f"loss.margin={loss.margin} has no effect: no row of data has scores; remove it")


def _unfit(loss: PairwiseLoss | PointwiseLoss, row: Comparison) -> bool:
    if isinstance(loss, PairwiseLoss):
        return len(row.answers) < 2 or (row.scores is not None and len(set(row.scores)) == 1)
    return row.scores is None or (loss.kind == "bce" and not all(0 <= score <= 1 for score in row.scores))
