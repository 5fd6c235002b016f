"""Evaluation of one checkpoint: each suite in turn, spoken through the same door that rollouts come through."""

from pathlib import Path

from configs.evaluation import EvalConfig
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.suites import SuiteResult
from rollout.pool import RolloutPool


def run(config: EvalConfig, evaluation: Evaluation, rollout: RolloutPool, folder: Path) -> dict[str, SuiteResult]:
    """Results of every suite by name."""
    return evaluation.run(rollout, config.sampling, config.seed, folder)
