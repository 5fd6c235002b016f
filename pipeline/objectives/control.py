"""Coefficients of the objective that follow a target from step to step."""


def adapted_kl_coef(kl_coef: float, *, divergence: float, target: float) -> float:
    """Compute the next step's coefficient beta from the divergence of this one, both in nats a token.

    It is beta (1 + 0.1 e), where e = divergence / target - 1, cut to [-0.2, 0.2]: a change of 2 % at most
    (arXiv:1909.08593 section 2.2, where the divergence is of whole completions).

    Example: `adapted_kl_coef(0.05, divergence=0.2, target=0.1) == 0.05 * 1.02`
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * error)
