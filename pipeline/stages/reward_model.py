"""Reward models: Bradley-Terry on compared answers, or regression to their scores (DeepSeek-V2 section 4.2)."""

from pathlib import Path

from configs.reward_model import RewardModelConfig
from pipeline.data.comparisons import Comparisons, TokenizedComparison
from pipeline.data.trees import Tree, scored_tree
from pipeline.evaluation.comparisons import ComparisonResult, evaluate, write_records
from pipeline.reports.report import Report
from pipeline.reports.stopwatch import Stopwatch
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.worker import Policy

UNKNOWN = float("nan")


def run(
    config: RewardModelConfig,
    steps: int,
    data: Comparisons,
    held_out: dict[str, Comparisons],
    policy: Policy,
    checkpoints: Checkpoints,
    report: Report,
    folder: Path,
) -> dict[str, ComparisonResult]:
    """One optimizer step a batch of comparisons; the loss is the mean over them. The last evaluation's records stay in
    `folder`; returns its results by the name of the held-out data."""
    watch = Stopwatch()
    results: dict[str, ComparisonResult] = {}
    for step in range(checkpoints.step + 1, steps + 1):
        trees = [_tree(comparison) for comparison in data.take(step, config.comparisons_per_step)]
        with watch("train"):
            metrics = policy.update(policy.shard(trees), float(len(trees)))
        due = config.eval_every_steps and step % config.eval_every_steps == 0
        if held_out and (due or step == steps):
            with watch("eval"):
                results = {name: evaluate(each, policy.scores, config.loss) for name, each in held_out.items()}
            for name, result in results.items():
                write_records(folder, name, result)
                metrics |= {f"eval/{name}/{figure}": value for figure, value in result.figures.items()}
        report.step(step, metrics | watch.lap(), expert_load=policy.expert_load() if report.page_due(step) else None)
        checkpoints.done(step, last=step == steps)
    return results


def _tree(one: TokenizedComparison) -> Tree:
    return scored_tree(one.prompt_ids, one.answer_ids, one.comparison.scores or [UNKNOWN] * len(one.answer_ids))
