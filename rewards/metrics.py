"""What a step's verdicts look like in numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from rewards.types import Status, Verdict


def summarize(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
    """Metrics of each reward's verdicts, keyed `reward/<name>/<stat>`.

    mean and pass_rate (score >= 1) are over verdicts with status ok, and absent where there is none; failure_rate
    (timeout and infra_error) and abstain_rate are over all; seconds_p50 and seconds_p99 are wall-clock per verdict.
    """
    metrics: dict[str, float] = {}
    for name, judged in verdicts.items():
        scores = np.array([verdict.score for verdict in judged if verdict.score is not None])
        if scores.size:
            metrics[f"reward/{name}/mean"] = float(scores.mean())
            metrics[f"reward/{name}/pass_rate"] = float((scores >= 1).mean())
        if judged:
            metrics[f"reward/{name}/failure_rate"] = sum(verdict.failed for verdict in judged) / len(judged)
            abstained = sum(verdict.status is Status.ABSTAIN for verdict in judged)
            metrics[f"reward/{name}/abstain_rate"] = abstained / len(judged)
            p50, p99 = np.percentile([verdict.seconds for verdict in judged], [50, 99])
            metrics[f"reward/{name}/seconds_p50"], metrics[f"reward/{name}/seconds_p99"] = float(p50), float(p99)
    return metrics
