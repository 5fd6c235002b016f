"""Coefficients of the objective that follow a target from step to step."""

from typing import NamedTuple

ENTROPY_STEP = 1e-3
"""Change of the entropy's coefficient in a step."""


class Coefficients(NamedTuple):
    """Coefficients of one step: beta of the divergence, None where it depends on the prompt alone; the entropy's."""

    kl: float | None = None
    entropy: float = 0.0


NO_COEFFICIENTS = Coefficients()
"""Neither beta nor entropy is adapted."""


def adapted_kl_coef(kl_coef: float, *, divergence: float, target: float) -> float:
    """Compute the next step's coefficient beta from the divergence of this one, both in nats a token.

    It is beta (1 + 0.1 e), where e = divergence / target - 1, cut to [-0.2, 0.2]: a change of 2 % at most
    (arXiv:1909.08593 section 2.2, where the divergence is of whole completions).

    Example: `adapted_kl_coef(0.05, divergence=0.2, target=0.1) == 0.05 * 1.02`
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * error)


def adapted_entropy_coef(entropy_coef: float, *, entropy: float, target: float) -> float:
    """Compute the next step's coefficient of the entropy from the entropy of this one, in nats a token.

    It grows by ENTROPY_STEP where the entropy is below the target and falls by as much where it is above, to 0 at least
    (steps of a fixed size: Skywork-OR1, arXiv:2505.22312).

    Example: `adapted_entropy_coef(0.002, entropy=0.1, target=0.3) == 0.003`
    """
    step = ENTROPY_STEP if entropy < target else -ENTROPY_STEP
    return max(entropy_coef + step, 0.0)
