"""Direct preference optimization: a policy learns from compared answers, without a reward model (arXiv:2305.18290)."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from configs.dpo import DPOConfig, DpoLoss
from configs.reward_model import PairwiseLoss
from configs.train import num_steps
from pipeline.cluster.start import start_all, start_ranks
from pipeline.data.comparisons import Comparisons, TokenizedComparison
from pipeline.data.rows import check_files
from pipeline.data.trees import Tree, compared_tree
from pipeline.disk.hashes import checkpoint_hashes
from pipeline.disk.recorded import EVALUATION, REFERENCE
from pipeline.evaluation.comparisons import (
    COMPARISONS_PER_CALL,
    ComparisonResult,
    ScoredComparison,
    comparison_figures,
    scored_comparison,
)
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.report import Report
from pipeline.stages.comparisons import ComparisonSets, run, target_scores
from pipeline.stages.context import Context
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.reference import reference_logprobs
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from pipeline.weights.resolve import check_adapters, check_template, resolve_model


def launch(config: DPOConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the comparisons, start the ranks, compute the reference's log-probabilities once, and train into `folder`.
    Returns the last step's metrics."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    sets = ComparisonSets.load(config, PairwiseLoss(type="pairwise"), tokenizer)
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
    )
    with (
        start_all(lambda: start_ranks(spec)) as (ranks,),
        Report(folder, total_steps=steps, label="dpo", report_to=context.report_to) as report,
    ):
        sets.report_bad_rows(folder, report)
        if not config.loss.reference_free:  # until a checkpoint is restored, the ranks hold the reference
            key = json.dumps([checkpoint_hashes(model), config.model.dtype, config.trainer.fp8])
            places = {"data": sets.data} | {f"eval/{name}": rows for name, rows in sets.held_out.items()}
            for place, rows in places.items():
                rows.ref_logprobs = reference_logprobs(folder / REFERENCE / place, rows, ranks, key)
        checkpoints = Checkpoints(folder, config.checkpoint, ranks, last_step=steps)
        report.resume(checkpoints.restore())
        results = run(
            config,
            steps,
            sets,
            ranks,
            checkpoints,
            report,
            folder / EVALUATION,
            tree=_tree,
            evaluate=lambda rows: _evaluate(rows, ranks, config.loss),
        )
    if results:
        Console().print(results_table({name: SuiteResult(result.figures) for name, result in results.items()}))
    return report.last_metrics


def check(config: DPOConfig) -> None:
    """Raise ValueError for a chat template or source that does not exist, and for adapters that don't fit."""
    check_template(config.model)
    check_adapters(config.lora)
    for data in (config.data, *config.eval_data.values()):
        check_files(data.source)


def _tree(tokenized: TokenizedComparison) -> Tree:
    scores = target_scores(tokenized)
    return compared_tree(tokenized.prompt_ids, tokenized.answer_ids, scores, tokenized.ref_logprobs)


def _evaluate(data: Comparisons, ranks: TrainingRanks, loss: DpoLoss) -> ComparisonResult:
    """Compute the implicit reward of every answer, beta log pi/pi_ref, and the figures of a reward model on them.

    `chosen_mean` and `rejected_mean` are the means of the best and of the worst answers.
    """
    records: list[ScoredComparison] = []
    for rows in data.parts(COMPARISONS_PER_CALL):
        for row, answers in zip(rows, ranks.answer_logprobs([_tree(row) for row in rows]), strict=True):
            reference = row.ref_logprobs or [np.float32(0.0)] * len(answers)
            ratios = [logprobs_N - ref_N for logprobs_N, ref_N in zip(answers, reference, strict=True)]
            combine = np.mean if loss.length_normalized else np.sum
            rewards = [loss.beta * float(combine(ratio_N, dtype=np.float64)) for ratio_N in ratios]
            records.append(scored_comparison(row, rewards))
    figures = comparison_figures(records)
    for name, place in (("chosen_mean", 0), ("rejected_mean", -1)):
        figures[name] = float(np.mean([record.scores[place] for record in records]))
    return ComparisonResult(figures, records)
