"""Reward models: Bradley-Terry on compared answers, or regression to their scores (DeepSeek-V2 section 4.2)."""

from pathlib import Path

from rich.console import Console

from configs.reward_model import RewardModelConfig
from configs.train import num_steps
from pipeline.cluster.start import start_all, start_ranks
from pipeline.data.comparisons import TokenizedComparison
from pipeline.data.rows import check_files
from pipeline.data.trees import Tree, scored_tree
from pipeline.disk.recorded import EVALUATION
from pipeline.evaluation.comparisons import evaluate_comparisons
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.report import Report
from pipeline.stages.comparisons import ComparisonSets, run, target_scores
from pipeline.stages.context import Context
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.weights.resolve import check_adapters, check_template, resolve_model


def launch(config: RewardModelConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the comparisons, start the ranks, and train into `folder`. Returns the last step's metrics."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    sets = ComparisonSets.load(config, config.loss, tokenizer)
    steps = num_steps(config.steps, config.epochs, rows=len(sets.data), rows_per_step=config.comparisons_per_step)
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
    with (
        start_all(lambda: start_ranks(spec)) as (ranks,),
        Report(folder, total_steps=steps, label="rm", report_to=context.report_to) as report,
    ):
        checkpoints = Checkpoints(folder, config.checkpoint, ranks, last_step=steps)
        report.resume(checkpoints.restore())
        sets.report_bad_rows(folder, report)
        results = run(
            config,
            steps,
            sets,
            ranks,
            checkpoints,
            report,
            folder / EVALUATION,
            tree=_tree,
            evaluate=lambda rows: evaluate_comparisons(rows, ranks.scores, config.loss),
        )
    if results:
        Console().print(results_table({name: SuiteResult(result.figures) for name, result in results.items()}))
    return report.last_metrics


def check(config: RewardModelConfig) -> None:
    """Raise ValueError for a chat template or source that does not exist, and for adapters that don't fit."""
    check_template(config.model)
    check_adapters(config.lora)
    for data in (config.data, *config.eval_data.values()):
        check_files(data.source)


def _tree(tokenized: TokenizedComparison) -> Tree:
    return scored_tree(tokenized.prompt_ids, tokenized.answer_ids, target_scores(tokenized))
