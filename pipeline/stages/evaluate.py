"""Evaluation of a checkpoint on suites, through the same engines that sample rollouts."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from configs.environment import VALUES
from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.model import ModelConfig
from pipeline.cluster.start import start_all, start_rewards, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.disk.files import read_json, write_atomic
from pipeline.disk.hashes import text_hash
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.evaluation.pairwise import Answers, baseline_prompts, greedy_answers
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.gates.cache import model_hash
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.alarms import CUT_SHORT, TRUNCATED_RATE
from pipeline.stages.context import Context
from pipeline.weights.resolve import check_template, resolve_model

BASELINES = "baselines"
"""Folder of a stage that keeps the answers of the checkpoints that its suites compare with."""


def run(
    config: EvalConfig | GateConfig,
    model: ModelConfig,
    checkpoint: Path,
    folder: Path,
    baselines: Mapping[str, Mapping[str, Answers]] | None = None,
) -> dict[str, SuiteResult]:
    """Evaluate `checkpoint`, with the chat template and dtype of `model`, on every suite in turn.

    Starts engines for this checkpoint only, since the next may have another architecture. baselines: see
    `baseline_answers`. Returns the results by suite; `folder` keeps their records.
    """
    tokenizer = load_tokenizer(checkpoint, model.chat_template)
    evaluation = Evaluation.prepare(config.suites, tokenizer, config.reward_pool, config.seed, start_rewards, baselines)
    with _engines(config, model, checkpoint, tokenizer) as (rollout,):
        return evaluation.run(rollout, config.sampling, config.seed, folder)


def baseline_answers(config: EvalConfig | GateConfig, folder: Path) -> dict[str, dict[str, Answers]]:
    """Return the greedy answers of every checkpoint that a suite compares with, by suite, baseline and prompt.

    Each checkpoint has engines of its own, and the chat template of its `model`. `folder` keeps the answers, named by
    a hash of what they depend on, and later calls read them there. Raises ValueError for prompts that the checkpoint
    can't read.
    """
    answers: dict[str, dict[str, Answers]] = {}
    for name, suite in config.suites.items():
        for key, model in suite.checkpoints().items():
            checkpoint = resolve_model(model, workdir=folder)
            made_of = [
                model_hash(checkpoint, model),
                suite.model_dump(mode="json", context=VALUES),
                config.sampling.max_tokens,
            ]
            file = folder / f"{name}.{key}.{text_hash(json.dumps([*made_of, config.seed]))[:16]}.json"
            if not file.is_file():
                tokenizer = load_tokenizer(checkpoint, model.chat_template)
                prompts = baseline_prompts(suite, tokenizer, config.seed)
                with _engines(config, model, checkpoint, tokenizer) as (rollout,):
                    generated = greedy_answers(prompts, rollout, config.sampling, config.seed, key)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(file, json.dumps(generated, indent=1, ensure_ascii=False))
            answers.setdefault(name, {})[key] = read_json(file, f"remove '{file}' to generate the answers again")
    return answers


def baseline_models(config: EvalConfig | GateConfig) -> list[ModelConfig]:
    """List the checkpoints that the suites compare with."""
    return [model for suite in config.suites.values() for model in suite.checkpoints().values()]


def _engines(
    config: EvalConfig | GateConfig, model: ModelConfig, checkpoint: Path, tokenizer: PreTrainedTokenizerFast
) -> AbstractContextManager[list[Any]]:
    start = partial(start_rollout, dtype=model.dtype, seed=config.seed, stop_token_ids=turn_ends(tokenizer))
    return start_all(lambda: start(checkpoint, config.rollout))


def launch(config: EvalConfig, folder: Path, context: Context) -> dict[str, float]:
    """Evaluate into `folder`. Returns the figures, named `SUITE/FIGURE`."""
    baselines = baseline_answers(config, folder / BASELINES)
    checkpoint = resolve_model(config.model, workdir=folder)
    results = run(config, config.model, checkpoint, folder, baselines)
    console = Console()
    console.print(results_table(results))
    for suite, result in results.items():
        if result.figures.get("truncated_rate", 0.0) > TRUNCATED_RATE and not config.sampling.ignore_eos:
            console.print(f"{suite}: {CUT_SHORT}", markup=False)
    return {f"{suite}/{figure}": value for suite, result in results.items() for figure, value in result.figures.items()}


def check(config: EvalConfig) -> None:
    """Raise ValueError for a chat template, source, text or reward that does not exist."""
    for model in (config.model, *baseline_models(config)):
        check_template(model)
    check_suites(config.suites, config.reward_pool)
