"""The figures of an evaluation, as pure functions of counts."""

import math
from statistics import NormalDist


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k completions is right, unbiased from num_samples of which num_correct are.

    1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374, eq. 1), as a product that neither overflows nor cancels.
    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@k needs 0 <= num_correct <= num_samples and 1 <= k <= num_samples, got "
            f"num_samples={num_samples}, num_correct={num_correct}, k={k}"
        )
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(num_samples - num_correct + 1, num_samples + 1))


def wilson_interval(passes: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Low and high end of a proportion's confidence interval (Wilson, 1927: the score test turned round).

    Unlike p +- z sqrt(p(1-p)/n) it keeps its promise for small totals and for proportions near 0 and 1. Items that
    depend on each other count as fewer, which need be no whole number. Raises ValueError unless 0 <= passes <= total,
    total >= 1 and 0 < confidence < 1.
    """
    if not (0 <= passes <= total and total >= 1 and 0 < confidence < 1):
        raise ValueError(
            f"an interval needs 0 <= passes <= total, total >= 1 and 0 < confidence < 1, got passes={passes}, "
            f"total={total}, confidence={confidence}"
        )
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = passes / total
    centre = share + z2 / (2 * total)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total)
    scale = 1 + z2 / total
    # The ends are exact where nothing or everything passed; rounding would put them a hair outside [0, 1].
    low = 0.0 if passes == 0 else (centre - half) / scale
    high = 1.0 if passes == total else (centre + half) / scale
    return low, high


def bits_per_byte(total_nll_nats: float, num_bytes: int) -> float:
    """Negative log-likelihood of a text in bits, per byte of it: comparable between tokenizers.

    Raises ValueError when there are no bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"bits per byte needs num_bytes >= 1, got {num_bytes}")
    return total_nll_nats / (math.log(2) * num_bytes)
