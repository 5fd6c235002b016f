"""Figures of evaluations as pure functions of counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate, without bias, the chance that at least one of k completions is right.

    1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374, eq. 1), as a product that neither overflows nor cancels.
    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.

    Example:
        pass_at_k(num_samples=4, num_correct=1, k=2)  # 0.5
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
    """Return the ends of a proportion's confidence interval (Wilson, 1927: the inverted score test).

    Unlike p +- z sqrt(p(1-p)/n), it has its coverage for small totals and for proportions near 0 and 1 too. Passes and
    total may be fractions, as dependent items are worth fewer independent ones. Raises ValueError unless
    0 <= passes <= total, total >= 1 and 0 < confidence < 1.

    Example:
        wilson_interval(8, 10)  # (0.49, 0.94)
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
    # Rounding could put an end just outside of [0, 1] where nothing or everything passed, so these are exact.
    low = 0.0 if passes == 0 else (centre - half) / scale
    high = 1.0 if passes == total else (centre + half) / scale
    return low, high


def bits_per_byte(total_nll_nats: float, num_bytes: int) -> float:
    """Return a text's negative log-likelihood in bits per byte, which compares across tokenizers.

    Raises ValueError without bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"bits per byte needs num_bytes >= 1, got {num_bytes}")
    return total_nll_nats / (math.log(2) * num_bytes)


@dataclass(frozen=True, slots=True)
class MeanDifference:
    """The difference of two means, with the interval of `welch_test` and its two-sided p; None where neither sample has
    any spread."""

    difference: float
    low: float
    high: float
    p: float | None


def welch_test(sample: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> MeanDifference:
    """Test whether two samples have the same mean, without the assumption that they spread alike (Welch, 1947): the
    test that Colas, Sigaud and Oudeyer (arXiv:1904.06979) recommend for runs over few seeds.

    Raises ValueError for fewer than two values.

    Example:
        welch_test([0.61, 0.58, 0.64], [0.52, 0.55, 0.49]).p  # 0.021
    """
    import mpmath  # 0.2 s

    if min(len(sample), len(other)) < 2:
        raise ValueError(f"a test needs two values of each sample, got {len(sample)} and {len(other)}")
    difference = fmean(sample) - fmean(other)
    parts = [variance(values) / len(values) for values in (sample, other)]
    error = math.sqrt(sum(parts))
    if not error:
        return MeanDifference(difference, difference, difference, None)
    freedom = error**4 / sum(p**2 / (len(values) - 1) for p, values in zip(parts, (sample, other), strict=True))

    def tails(t: float) -> float:
        """Chance that Student's t lies beyond +-t."""
        return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))

    low, high = 0.0, 1e4  # bisection for the quantile
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tails(middle) > 1 - confidence else (low, middle)
    half = high * error
    return MeanDifference(difference, difference - half, difference + half, tails(difference / error))
