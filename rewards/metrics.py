"""What a step's verdicts, and the pools that gave them, look like in numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.types import Status, Verdict


@dataclass(frozen=True)
class Passage:
    """One group's way through a pool, as times in seconds on one clock; `judged` minus `started` kept a worker busy."""

    submitted: float
    started: float
    judged: float


def summarize(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
    """Metrics of each reward's verdicts, keyed `reward/<label>/<stat>`.

    mean, std and pass_rate (score >= 1) are over verdicts with status ok, and absent where there is none, as is
    outcome/<outcome>_rate of each outcome that one of them names; failure_rate (timeout and infra_error) and
    abstain_rate are over all; seconds_p50 and seconds_p99 are wall-clock per verdict.
    """
    metrics: dict[str, float] = {}
    for label, judged in verdicts.items():
        if not judged:
            continue
        metrics[f"reward/{label}/failure_rate"] = sum(verdict.failed for verdict in judged) / len(judged)
        abstained = sum(verdict.status is Status.ABSTAIN for verdict in judged)
        metrics[f"reward/{label}/abstain_rate"] = abstained / len(judged)
        p50, p99 = np.percentile([verdict.seconds for verdict in judged], [50, 99])
        metrics[f"reward/{label}/seconds_p50"], metrics[f"reward/{label}/seconds_p99"] = float(p50), float(p99)
        scored = [verdict for verdict in judged if verdict.score is not None]
        if scored:
            scores = np.array([verdict.score for verdict in scored], dtype=np.float64)
            metrics[f"reward/{label}/mean"], metrics[f"reward/{label}/std"] = float(scores.mean()), float(scores.std())
            metrics[f"reward/{label}/pass_rate"] = float((scores >= 1).mean())
        for outcome, count in Counter(verdict.outcome for verdict in scored if verdict.outcome).items():
            metrics[f"reward/{label}/outcome/{outcome.replace(' ', '_')}_rate"] = count / len(scored)
    return metrics


def summarize_pool(crew: str, passages: Sequence[Passage], *, workers: int, replaced: int) -> dict[str, float]:
    """Metrics of one crew of judges, keyed `reward_pool/<crew>/<stat>`; none where no group passed.

    queue_depth_max: most groups that waited for a worker at one time. latency_p50 and latency_p99: seconds from submit
    to judged. utilisation: share of the workers' time, from the first submit to the last verdict, that they spent on
    groups. replaced: workers lost.
    """
    if not passages:
        return {}
    # At equal times a start comes first: a group that never waited doesn't count as waiting.
    steps = sorted([(passage.submitted, 1) for passage in passages] + [(passage.started, -1) for passage in passages])
    span = max(passage.judged for passage in passages) - min(passage.submitted for passage in passages)
    busy = sum(passage.judged - passage.started for passage in passages)
    p50, p99 = np.percentile([passage.judged - passage.submitted for passage in passages], [50, 99])
    stats = {
        "queue_depth_max": float(max(np.cumsum([step for _, step in steps]))),
        "latency_p50": float(p50),
        "latency_p99": float(p99),
        "utilisation": busy / (workers * span),
        "replaced": float(replaced),
    }
    return {f"reward_pool/{crew}/{stat}": value for stat, value in stats.items()}
