"""Evaluation of a policy while it trains, on the suites of the gate that will decide on it."""

import time
from pathlib import Path

from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from pipeline.evaluation.evaluate import Evaluation
from pipeline.gates.rules import lower_is_better, value_of
from pipeline.train.checkpoints import Checkpoints
from rollout.pool import RolloutPool


class Validation:
    """Every so many steps the gate's suites, spoken by the stage's own engines, which hold that step's weights.

    Nothing here draws from what training draws from: every request seeds the engines anew, and the suites' rewards have
    pools of their own.
    """

    def __init__(
        self,
        config: GRPOConfig,
        gate: GateConfig,
        evaluation: Evaluation,
        rollout: RolloutPool,
        checkpoints: Checkpoints,
        folder: Path,
    ) -> None:
        """What was said in the newest evaluation is left in `folder`."""
        assert config.validation is not None, "asked for"
        self._every_steps, self._last = config.validation.every_steps, config.steps
        self._gate = gate
        self._evaluation = evaluation
        self._rollout = rollout
        self._checkpoints = checkpoints
        self._folder = folder

    def figures(self, step: int) -> dict[str, float]:
        """`validation/SUITE/FIGURE` of the policy after `step`, and the seconds it took. The policy is kept where it is
        the best so far by the figure of the gate's first rule. Empty for a step that none is due after.

        Raises ValueError where the suites have no such figure.
        """
        if step % self._every_steps and step != self._last:
            return {}
        started = time.monotonic()
        with self._rollout.awake():
            results = self._evaluation.run(self._rollout, self._gate.sampling, self._gate.seed, self._folder)
        self._rollout.metrics()  # what the engines spent here is none of the next step's
        decisive = self._gate.rules[0].figure
        self._checkpoints.offer(step, decisive, value_of(decisive, results), lower_is_better=lower_is_better(decisive))
        figures = {
            f"validation/{suite}/{figure}": value
            for suite, result in results.items()
            for figure, value in result.figures.items()
        }
        return figures | {"time/validate_seconds": time.monotonic() - started}
