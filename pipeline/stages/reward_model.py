"""Reward models: Bradley-Terry on compared answers, or regression to their scores (DeepSeek-V2 section 4.2)."""

from pathlib import Path

from rich.console import Console

from configs.reward_model import PairwiseLoss, PointwiseLoss, RewardModelConfig
from configs.train import num_steps
from pipeline.cluster.start import start_all, start_ranks
from pipeline.data.comparisons import Comparison, Comparisons, TokenizedComparison
from pipeline.data.order import refuse_repeats
from pipeline.data.rows import report_bad_rows, source_files
from pipeline.data.trees import Tree, scored_tree
from pipeline.disk.recorded import EVALUATION
from pipeline.evaluation.comparisons import ComparisonResult, evaluate_comparisons, write_records
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.report import Report
from pipeline.reports.stopwatch import Stopwatch
from pipeline.stages.context import Context
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from pipeline.weights.resolve import check_adapters, check_template, resolve_model

UNKNOWN = float("nan")


def run(
    config: RewardModelConfig,
    steps: int,
    data: Comparisons,
    held_out: dict[str, Comparisons],
    ranks: TrainingRanks,
    checkpoints: Checkpoints,
    report: Report,
    folder: Path,
) -> dict[str, ComparisonResult]:
    """Do one optimizer step for each batch of comparisons; the loss is their mean.

    Returns the results of the last evaluation by the name of the held-out data; `folder` keeps its records.
    """
    watch = Stopwatch()
    results: dict[str, ComparisonResult] = {}
    for step in range(checkpoints.step + 1, steps + 1):
        trees = [_tree(comparison) for comparison in data.take(step, config.comparisons_per_step)]
        with watch("train"):
            metrics = ranks.update(ranks.shard(trees), float(len(trees)))
        eval_due = config.eval_every_steps and step % config.eval_every_steps == 0
        if held_out and (eval_due or step == steps):
            with watch("eval"):
                results = {
                    name: evaluate_comparisons(rows, ranks.scores, config.loss) for name, rows in held_out.items()
                }
            for name, result in results.items():
                write_records(folder, name, result)
                metrics |= {f"eval/{name}/{figure}": value for figure, value in result.figures.items()}
        report.step(step, metrics | watch.lap(), expert_load=ranks.expert_load() if report.page_due(step) else None)
        checkpoints.write(step)
        checkpoints.done(step)
    return results


def launch(config: RewardModelConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the comparisons, start the ranks, and train into `folder`. Returns the last step's metrics."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    data = Comparisons.load(config.data, tokenizer, config.seed)
    refuse_repeats("comparisons_per_step", config.comparisons_per_step, len(data))
    refuse_unlearnable(config.loss, data)
    held_out = {name: Comparisons.load(source, tokenizer, config.seed) for name, source in config.eval_data.items()}
    steps = num_steps(config.steps, config.epochs, rows=len(data), rows_per_step=config.comparisons_per_step)
    spec = TrainSpec(
        model,
        config.model.dtype,
        config.trainer,
        config.optimizer,
        steps,
        chat_template=config.model.chat_template,
        lora=config.lora,
        objective=config.loss,
        balance=config.balance,
        head_seed=config.seed,
    )
    with start_all(lambda: start_ranks(spec)) as (ranks,), Report(folder, total_steps=steps, label="rm") as report:
        checkpoints = Checkpoints(folder, config.checkpoint, ranks, last_step=steps)
        report.resume(checkpoints.restore())
        report_bad_rows(data.bad_rows, folder / "bad_rows.jsonl", report.note)
        for name, rows in held_out.items():
            report_bad_rows(rows.bad_rows, folder / f"{name}.bad_rows.jsonl", report.note)
        results = run(config, steps, data, held_out, ranks, checkpoints, report, folder / EVALUATION)
    if results:
        Console().print(results_table({name: SuiteResult(result.figures) for name, result in results.items()}))
    return report.last_metrics


def check(config: RewardModelConfig) -> None:
    """Raise ValueError for a chat template or source that does not exist, and for adapters that don't fit."""
    check_template(config.model)
    check_adapters(config.lora)
    for data in (config.data, *config.eval_data.values()):
        source_files(data.source)


def refuse_unlearnable(loss: PairwiseLoss | PointwiseLoss, data: Comparisons) -> None:
    """Raise ValueError, naming the first row, for comparisons that give the loss no gradient, and for a margin without
    scores."""
    rows = [data[index].comparison for index in range(len(data))]
    unlearnable = [row for row in rows if _is_unlearnable(loss, row)]
    if unlearnable:
        remedy = {
            "pairwise": "it needs two answers or more with an order; drop the others, or set loss.type=pointwise",
            "pointwise": "it needs a score for every answer, for kind 'bce' between 0 and 1",
        }[loss.type]
        raise ValueError(
            f"loss.type={loss.type} can't learn from {len(unlearnable)} rows of data ({unlearnable[0].row}): {remedy}"
        )
    if isinstance(loss, PairwiseLoss) and loss.margin and all(row.scores is None for row in rows):
        raise ValueError(f"loss.margin={loss.margin} has no effect: no row of data has scores; remove it")


def _is_unlearnable(loss: PairwiseLoss | PointwiseLoss, row: Comparison) -> bool:
    if isinstance(loss, PairwiseLoss):
        return len(row.answers) < 2 or (row.scores is not None and len(set(row.scores)) == 1)
    return row.scores is None or (loss.kind == "bce" and not all(0 <= score <= 1 for score in row.scores))


def _tree(tokenized: TokenizedComparison) -> Tree:
    scores = tokenized.comparison.scores or [UNKNOWN] * len(tokenized.answer_ids)
    return scored_tree(tokenized.prompt_ids, tokenized.answer_ids, scores)
