"""Evaluation of a policy while it trains, on the suites of the gate that will decide on it."""

import time
from collections.abc import Callable
from pathlib import Path

from configs.gate import GateConfig
from pipeline.evaluation.evaluate import Evaluation
from pipeline.gates.rules import lower_is_better, value_of
from pipeline.train.checkpoints import Checkpoints
from rollout.pool import RolloutPool


class Validation:
    """Runs a gate's suites after the steps where `is_due` is true, on the stage's own engines.

    It does not disturb training: every request seeds the engines anew, and the suites' rewards have their own pools.
    """

    def __init__(
        self,
        gate: GateConfig,
        evaluation: Evaluation,
        rollout: RolloutPool,
        checkpoints: Checkpoints,
        folder: Path,
        is_due: Callable[[int], bool],
    ) -> None:
        """`folder` gets the records of the newest evaluation."""
        self._gate = gate
        self._evaluation = evaluation
        self._rollout = rollout
        self._checkpoints = checkpoints
        self._folder = folder
        self._is_due = is_due

    def figures(self, step: int) -> dict[str, float]:
        """Evaluate the policy after `step` where that is due, on engines that are awake with its weights; return
        `validation/SUITE/FIGURE` and the seconds spent.

        The policy is kept if the figure of the gate's first rule is the best so far. Raises ValueError where the suites
        have no such figure.
        """
        if not self._is_due(step):
            return {}
        started = time.monotonic()
        with self._rollout.reserved():
            results = self._evaluation.run(self._rollout, self._gate.sampling, self._gate.seed, self._folder)
        decisive = self._gate.rules[0].figure
        self._checkpoints.offer(step, decisive, value_of(decisive, results), lower_is_better=lower_is_better(decisive))
        figures = {
            f"validation/{suite}/{figure}": value
            for suite, result in results.items()
            for figure, value in result.figures.items()
        }
        return figures | {"time/validate_seconds": time.monotonic() - started}
