"""Training on comparisons: the data and the algorithm of the stages `rm` and `dpo`, which differ in how they read an
answer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from configs.dpo import DPOConfig
from configs.reward_model import PairwiseLoss, PointwiseLoss, RewardModelConfig
from pipeline.data.comparisons import Comparison, Comparisons, TokenizedComparison
from pipeline.data.order import refuse_repeats
from pipeline.data.rows import report_bad_rows
from pipeline.data.trees import Tree
from pipeline.evaluation.comparisons import ComparisonResult, write_records
from pipeline.reports.report import Report
from pipeline.reports.stopwatch import Stopwatch
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.worker import TrainingRanks

UNKNOWN = float("nan")


@dataclass(frozen=True)
class ComparisonSets:
    """Comparisons to learn from, and held-out ones by name."""

    data: Comparisons
    held_out: dict[str, Comparisons]

    @classmethod
    def load(
        cls,
        config: RewardModelConfig | DPOConfig,
        loss: PairwiseLoss | PointwiseLoss,
        tokenizer: PreTrainedTokenizerFast,
    ) -> "ComparisonSets":
        """Load the data of `config`. Raises ValueError for data that a step would repeat, or that `loss` can't learn
        from."""
        data = Comparisons.load(config.data, tokenizer, config.seed)
        refuse_repeats("comparisons_per_step", config.comparisons_per_step, len(data))
        refuse_unlearnable(loss, data)
        held_out = {name: Comparisons.load(source, tokenizer, config.seed) for name, source in config.eval_data.items()}
        return cls(data, held_out)

    def report_bad_rows(self, folder: Path, report: Report) -> None:
        """Write the bad rows into `folder`, and note their number."""
        report_bad_rows(self.data.bad_rows, folder / "bad_rows.jsonl", report.note)
        for name, rows in self.held_out.items():
            report_bad_rows(rows.bad_rows, folder / f"{name}.bad_rows.jsonl", report.note)


def run(
    config: RewardModelConfig | DPOConfig,
    steps: int,
    sets: ComparisonSets,
    ranks: TrainingRanks,
    checkpoints: Checkpoints,
    report: Report,
    folder: Path,
    *,
    tree: Callable[[TokenizedComparison], Tree],
    evaluate: Callable[[Comparisons], ComparisonResult],
) -> dict[str, ComparisonResult]:
    """Do one optimizer step for each batch of comparisons; the loss is their mean.

    tree: makes the tree that is trained. evaluate: evaluates held-out data. Returns the results of the last evaluation
    by the name of the held-out data; `folder` keeps its records.
    """
    watch = Stopwatch()
    results: dict[str, ComparisonResult] = {}
    for step in range(checkpoints.step + 1, steps + 1):
        trees = [tree(comparison) for comparison in sets.data.take(step, config.comparisons_per_step)]
        with watch("train"):
            metrics = ranks.update(ranks.shard(trees), float(len(trees)))
        eval_due = config.eval_every_steps and step % config.eval_every_steps == 0
        if sets.held_out and (eval_due or step == steps):
            with watch("eval"):
                results = {name: evaluate(rows) for name, rows in sets.held_out.items()}
            for name, result in results.items():
                write_records(folder, name, result)
                metrics |= {f"eval/{name}/{figure}": value for figure, value in result.figures.items()}
        report.step(step, metrics | watch.lap(), expert_load=ranks.expert_load() if report.page_due(step) else None)
        checkpoints.write(step)
        checkpoints.done(step)
    return results


def target_scores(tokenized: TokenizedComparison) -> list[float]:
    """Return the data's score of each answer, NaN where only the order is known."""
    return tokenized.comparison.scores or [UNKNOWN] * len(tokenized.answer_ids)


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
