"""Metrics of verdicts, and of the workers that judged."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.types import Status, Verdict


@dataclass(frozen=True)
class JobTimes:
    """Times of one job in seconds on one clock. A worker is busy from `started` to `judged`."""

    submitted: float
    started: float
    judged: float


def summarize(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
    """Metrics of the verdicts by reward label, keyed `reward/<label>/<stat>`.

    failure_rate (timeout and infra_error) and abstain_rate are shares of all verdicts; seconds_p50 and seconds_p99 are
    wall-clock per verdict. mean, std, pass_rate (score >= 1) and outcome/<outcome>_rate are over the verdicts with
    status ok, and absent where there is none.
    """
    metrics: dict[str, float] = {}
    for label, label_verdicts in verdicts.items():
        if not label_verdicts:
            continue
        failures = sum(verdict.failed for verdict in label_verdicts)
        metrics[f"reward/{label}/failure_rate"] = failures / len(label_verdicts)
        abstentions = sum(verdict.status is Status.ABSTAIN for verdict in label_verdicts)
        metrics[f"reward/{label}/abstain_rate"] = abstentions / len(label_verdicts)
        p50, p99 = np.percentile([verdict.seconds for verdict in label_verdicts], [50, 99])
        metrics[f"reward/{label}/seconds_p50"], metrics[f"reward/{label}/seconds_p99"] = float(p50), float(p99)
        scored = [verdict for verdict in label_verdicts if verdict.score is not None]
        if scored:
            scores = np.array([verdict.score for verdict in scored], dtype=np.float64)
            metrics[f"reward/{label}/mean"], metrics[f"reward/{label}/std"] = float(scores.mean()), float(scores.std())
            metrics[f"reward/{label}/pass_rate"] = float((scores >= 1).mean())
        for outcome, count in Counter(verdict.outcome for verdict in scored if verdict.outcome).items():
            metrics[f"reward/{label}/outcome/{outcome.replace(' ', '_')}_rate"] = count / len(scored)
    return metrics


def summarize_workers(name: str, jobs: Sequence[JobTimes], *, workers: int, replaced: int) -> dict[str, float]:
    """Metrics of the worker group `name`, keyed `reward_pool/<name>/<stat>`; empty without jobs.

    queue_depth_max: largest number of jobs that waited at one time. latency_p50 and latency_p99: seconds from submitted
    to judged. utilisation: busy share of the workers' time between the first submit and the last verdict. replaced:
    lost workers.
    """
    if not jobs:
        return {}
    # At equal times a start comes before a submit, so that a job that starts at once never counts as waiting.
    steps = sorted([(job.submitted, 1) for job in jobs] + [(job.started, -1) for job in jobs])
    span = max(job.judged for job in jobs) - min(job.submitted for job in jobs)
    busy = sum(job.judged - job.started for job in jobs)
    p50, p99 = np.percentile([job.judged - job.submitted for job in jobs], [50, 99])
    stats = {
        "queue_depth_max": float(max(np.cumsum([step for _, step in steps]))),
        "latency_p50": float(p50),
        "latency_p99": float(p99),
        "utilisation": busy / (workers * span),
        "replaced": float(replaced),
    }
    return {f"reward_pool/{name}/{stat}": value for stat, value in stats.items()}
