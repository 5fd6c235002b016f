"""Evaluation of one checkpoint: each suite in turn, spoken through the same door that rollouts come through."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from configs.stages import EvalConfig, TaskSuite
from pipeline.data.prompts import Prompts
from pipeline.evaluation.suites import SuiteResult, run_task_suite, run_text_suite
from pipeline.fleet import start_all, start_rewards
from rollout.pool import RolloutPool


def run(
    config: EvalConfig,
    prompts: dict[str, Prompts],
    tokenizer: PreTrainedTokenizerFast,
    rollout: RolloutPool,
    folder: Path,
) -> dict[str, SuiteResult]:
    """Results of every suite by name; each suite's reward has a pool of its own while the suite runs."""
    results: dict[str, SuiteResult] = {}
    for name, suite in config.suites.items():
        if isinstance(suite, TaskSuite):
            specs = [suite.reward]
            with start_all(lambda specs=specs: start_rewards(specs, config.reward_pool)) as (rewards,):
                results[name] = run_task_suite(
                    suite, prompts[name], rollout, rewards, config.sampling, config.seed, folder / f"{name}.jsonl"
                )
        else:
            results[name] = run_text_suite(suite, tokenizer, rollout)
    return results
