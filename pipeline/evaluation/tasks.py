"""Tasks judged by a reward."""

from collections.abc import Sequence
from itertools import groupby

from configs.evaluation import JudgedSuite
from pipeline.data.prompts import Prompts
from pipeline.evaluation.speaking import judged_by, rates, speak
from pipeline.evaluation.statistics import pass_at_k
from pipeline.evaluation.suites import Items, Record, Session, SuiteResult, result


def run_tasks(suite: JudgedSuite, prompts: Prompts, session: Session) -> SuiteResult:
    """One greedy and `suite.samples` sampled completions of every prompt, judged by the suite's one reward.

    For the figures see `task_result`. Raises whatever the handles raise (RewardsUnavailable when judging breaks down).
    """
    [spec] = suite.rewards()
    asked = judged_by([prompts[i] for i in range(len(prompts))], spec.label)
    records = speak(asked, session, "greedy", 1, spec.label)
    if suite.samples:
        records += speak(asked, session, "sampled", suite.samples, spec.label)
    return task_result(records, suite.pass_score, suite.k)


def task_result(records: Sequence[Record], pass_score: float, ks: Sequence[int]) -> SuiteResult:
    """Figures of judged completions: the greedy ones, then the sampled ones, each in the order of the prompts.

    A pass is a score of at least `pass_score`, and only judged completions count. `pass@1_greedy`, the share of prompts
    whose greedy completion passes, with its interval; `pass@1_sampled`, the mean over prompts of their samples' share
    of passes; `pass@<k>`, the mean over prompts with at least k judged samples; `score_mean`, the mean over prompts of
    their samples' mean score, and `score_mean_greedy`. Besides, what `rates` gives.
    """
    greedy = {record.row: record.score for record in records if record.mode == "greedy" and record.score is not None}
    sampled: dict[str, list[float]] = {}
    of_samples = (record for record in records if record.mode == "sampled")
    for _, of_prompt in groupby(of_samples, key=lambda record: record.index):
        completions = list(of_prompt)
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
    return result(items, ["pass@1_greedy"], rates(records), records)
