"""Suites of tasks that one reward judges."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from configs.suites import JudgedSuite
from pipeline.data.prompts import Prompts
from pipeline.evaluation.generation import generate, rates
from pipeline.evaluation.statistics import pass_at_k
from pipeline.evaluation.suites import CompletionRecord, Items, Session, SuiteResult, suite_result


def run_tasks(suite: JudgedSuite, prompts: Prompts, session: Session) -> SuiteResult:
    """Judge one greedy and `suite.samples` sampled completions of every prompt by the suite's one reward.

    See `task_result` for the figures. Raises the exceptions of the handles (RewardsUnavailable for broken judges).
    """
    [spec] = suite.rewards()
    # The suite's reward overrides those that the rows name.
    suite_prompts = [replace(prompt, task=replace(prompt.task, kind=spec.label)) for prompt in prompts]
    records = generate(suite_prompts, session, "greedy", 1, spec.label)
    if suite.samples:
        records += generate(suite_prompts, session, "sampled", suite.samples, spec.label)
    return task_result(records, suite.pass_score, suite.k)


def task_result(records: Sequence[CompletionRecord], pass_score: float, ks: Sequence[int]) -> SuiteResult:
    """Return the figures of the greedy, then the sampled completions, each in the order of the prompts.

    A completion passes with a score of at least `pass_score`; only judged ones count. `pass@1_greedy` is the share of
    prompts whose greedy completion passes, with its interval; `pass@1_sampled` the mean over prompts of the share of
    samples that pass; `pass@<k>` the unbiased estimate, over prompts with at least k judged samples; `score_mean` the
    mean over prompts of the samples' mean score; `score_mean_greedy` that of greedy completions. See also `rates`.
    """
    greedy = {record.row: record.score for record in records if record.mode == "greedy" and record.score is not None}
    sampled: dict[str, list[float]] = {}
    samples = (record for record in records if record.mode == "sampled")
    for _, group in groupby(samples, key=lambda record: record.index):
        completions = list(group)
        scores = [record.score for record in completions if record.score is not None]
        if scores:
            sampled[completions[0].row] = scores
    items: dict[str, Items] = {"pass@1_greedy": {row: float(score >= pass_score) for row, score in greedy.items()}}
    for name, k in [("pass@1_sampled", 1), *((f"pass@{k}", k) for k in ks)]:
        items[name] = {
            row: pass_at_k(len(scores), sum(score >= pass_score for score in scores), k)
            for row, scores in sampled.items()
            if len(scores) >= k
        }
    items["score_mean"] = {row: sum(scores) / len(scores) for row, scores in sampled.items()}
    items["score_mean_greedy"] = greedy
    return suite_result(items, ["pass@1_greedy"], rates(records), records)
