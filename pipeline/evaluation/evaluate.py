"""Evaluation of a checkpoint: read all suites first, then run each suite and write its records.

The stage `eval`, gates, and the validation within a training stage all evaluate through `Evaluation`.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import rich
from transformers import PreTrainedTokenizerFast

from configs.data import DatasetSource
from configs.evaluation import (
    AnySuite,
    ConversationSuite,
    IFEvalSuite,
    LMEvalSuite,
    MultipleChoiceSuite,
    NeedleSuite,
    QuestionSuite,
    RefusalSuite,
    TaskSuite,
    TextSuite,
    VerdictSuite,
)
from configs.pairwise import PairwiseSuite
from configs.program_suites import CruxEvalSuite, HumanEvalSuite, LiveCodeBenchSuite, MBPPSuite
from configs.references import PREFIX
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import SamplingConfig
from configs.suites import PromptedSuite
from pipeline.data.prompts import Prompts, judgeable
from pipeline.data.rows import BadRows, Row, check_files
from pipeline.disk.files import write_atomic, write_json_lines
from pipeline.evaluation.choices import load_choices, run_choices
from pipeline.evaluation.conversations import conversation_task, run_conversations
from pipeline.evaluation.generation import load_prompts
from pipeline.evaluation.harness import check_harness, load_harness, run_harness
from pipeline.evaluation.ifeval import instruction_task, run_ifeval
from pipeline.evaluation.needles import load_needles, run_needles
from pipeline.evaluation.pairwise import Answers, load_contest, run_pairwise
from pipeline.evaluation.programs import program_task
from pipeline.evaluation.questions import question_task
from pipeline.evaluation.refusals import request_task, run_refusals
from pipeline.evaluation.suites import ITEMS, RESAMPLED, Session, SuiteResult
from pipeline.evaluation.tasks import run_tasks
from pipeline.evaluation.texts import load_text, run_text
from pipeline.evaluation.verdicts import load_verdicts, run_verdicts
from rewards.pool.guard import Judges, inspect, refuse_idle_workers
from rewards.pool.workers import RewardPool
from rewards.types import Placement, Task
from rollout.pool import RolloutPool


def check_suites(suites: Mapping[str, AnySuite], reward_pool: RewardPoolConfig) -> None:
    """Raise ValueError for a missing file, reward or task, before anything starts."""
    for name, suite in suites.items():
        for key, source in suite.reads().items():
            try:
                if not isinstance(source, Path):
                    check_files(source)
                paths = source.paths if isinstance(source, DatasetSource) else []
                for path in map(str, [source] if isinstance(source, Path) else paths):
                    if not path.startswith(PREFIX) and not Path(path).exists():
                        raise ValueError(f"'{path}' does not exist")
            except ValueError as error:
                raise ValueError(f"suites.{name}.{key}: {error}") from error
        if isinstance(suite, LMEvalSuite):
            check_harness(suite)
    suite_specs = [specs for suite in suites.values() if (specs := suite.rewards())]
    inspected = [inspect(specs, reward_pool) for specs in suite_specs]
    refuse_idle_workers(reward_pool, [pool for pools in inspected for pool in pools.values()])


@dataclass(frozen=True, slots=True)
class _PreparedSuite:
    """A suite with its prompts or texts loaded."""

    suite: AnySuite
    run: Callable[[Session], SuiteResult]
    bad_rows: BadRows | None = None
    placements: Mapping[str, Placement] | None = None
    """Placements of the suite's rewards, which were built to check its prompts."""


class StartJudges(Protocol):
    """Starts the judges of a suite: pipeline.cluster.start.start_rewards."""

    def __call__(
        self,
        specs: list[RewardSpec],
        config: RewardPoolConfig,
        placements: Mapping[str, Placement] | None = None,
        *,
        suite: str = "",
    ) -> RewardPool: ...


class Evaluation:
    """Suites that are ready to run, on one set of weights or on several.

    Example:
        evaluation = Evaluation.prepare(config.suites, tokenizer, config.reward_pool, config.seed, start_rewards)
        results = evaluation.run(rollout, config.sampling, config.seed, folder)
        results["sums"].figures["pass@1_greedy"]
    """

    def __init__(
        self, prepared: Mapping[str, _PreparedSuite], reward_pool: RewardPoolConfig, start_judges: StartJudges
    ) -> None:
        self._prepared = dict(prepared)
        self._reward_pool = reward_pool
        self._start_judges = start_judges

    @classmethod
    def prepare(
        cls,
        suites: Mapping[str, AnySuite],
        tokenizer: PreTrainedTokenizerFast,
        reward_pool: RewardPoolConfig,
        seed: int,
        start_judges: StartJudges,
        answers: Mapping[str, Mapping[str, Answers]] | None = None,
    ) -> "Evaluation":
        """Load every prompt and text of `suites`, and report bad rows. start_judges: starts the judges of a suite when
        it runs. answers: those of the checkpoints that suites compare with, by suite and baseline.

        Raises ValueError, with the name of the suite, for an unreadable source and too many bad rows.
        """
        prepared: dict[str, _PreparedSuite] = {}
        for name, suite in suites.items():
            try:
                specs = suite.rewards()
                with Judges(specs, reward_pool) if specs else nullcontext() as judges:
                    loaded = _prepare(suite, tokenizer, seed, judges, (answers or {}).get(name, {}))
                prepared[name] = replace(loaded, placements=judges.placements if judges else None)
            except ValueError as error:
                raise ValueError(f"suites.{name}: {error}") from error
            bad_rows = prepared[name].bad_rows
            if bad_rows is not None and bad_rows.counts:
                rich.get_console().print(f"suites.{name}: {bad_rows.summary()}", markup=False)
        return cls(prepared, reward_pool, start_judges)

    def run(self, rollout: RolloutPool, sampling: SamplingConfig, seed: int, folder: Path) -> dict[str, SuiteResult]:
        """Run every suite, each with a pool of its own for its rewards, and return the results by name.

        Writes to `folder`: `<suite>.jsonl`, the records; `<suite>.bad_rows.jsonl`, the bad rows; at last `items.json`,
        the values behind the figures by suite, figure and item, and `resampled.json`, those of figures that are no
        means. Raises the exceptions of the handles
        (RewardsUnavailable for broken judges).
        """
        folder.mkdir(parents=True, exist_ok=True)
        results: dict[str, SuiteResult] = {}
        for name, prepared in self._prepared.items():
            if prepared.bad_rows is not None and prepared.bad_rows.counts:
                prepared.bad_rows.write(folder / f"{name}.bad_rows.jsonl")
            specs = prepared.suite.rewards()
            # The engines run already, and so does their cluster.
            pool = (
                closing(self._start_judges(specs, self._reward_pool, prepared.placements, suite=name))
                if specs
                else nullcontext()
            )
            with pool as rewards:
                results[name] = prepared.run(Session(rollout, rewards, sampling, seed))
            if results[name].records:
                write_json_lines(folder / f"{name}.jsonl", [asdict(record) for record in results[name].records])
        resampled = {name: result.resampled for name, result in results.items() if result.resampled}
        write_atomic(folder / RESAMPLED, json.dumps(resampled))
        items = {name: result.items for name, result in results.items()}
        write_atomic(folder / ITEMS, json.dumps(items, indent=1, ensure_ascii=False))
        return results


def _prepare(
    suite: AnySuite,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    judges: Judges | None,
    answers: Mapping[str, Answers],
) -> _PreparedSuite:
    def prompts_of(prompted: PromptedSuite, task_of: Callable[[Row], Task | None]) -> Prompts:
        assert judges is not None, "a suite with prompts has rewards"
        prompts = load_prompts(prompted, tokenizer, task_of, seed)
        return prompts.without(judges.problems([prompt.task for prompt in prompts]), prompted.max_bad_share)

    match suite:
        case TaskSuite():
            assert judges is not None, "a suite of tasks has a reward"
            prompts = judgeable(suite.prompts, judges, tokenizer, seed)
            return _PreparedSuite(suite, partial(run_tasks, suite, prompts), prompts.bad_rows)
        case HumanEvalSuite() | MBPPSuite() | LiveCodeBenchSuite() | CruxEvalSuite() | QuestionSuite():
            task_of = question_task(suite) if isinstance(suite, QuestionSuite) else program_task(suite)
            prompts = prompts_of(suite, task_of)
            return _PreparedSuite(suite, partial(run_tasks, suite, prompts), prompts.bad_rows)
        case IFEvalSuite():
            prompts = prompts_of(suite, instruction_task)
            return _PreparedSuite(suite, partial(run_ifeval, prompts), prompts.bad_rows)
        case ConversationSuite():
            prompts = prompts_of(suite, conversation_task(suite))
            return _PreparedSuite(suite, partial(run_conversations, suite, prompts, tokenizer), prompts.bad_rows)
        case PairwiseSuite():
            assert judges is not None, "a comparison has a judge"
            contest = load_contest(suite, judges, tokenizer, seed, answers)
            return _PreparedSuite(suite, partial(run_pairwise, suite, contest), contest.prompts.bad_rows)
        case RefusalSuite():
            prompts = prompts_of(suite, request_task(suite))
            return _PreparedSuite(suite, partial(run_refusals, suite, prompts), prompts.bad_rows)
        case VerdictSuite():
            comparisons, bad_rows = load_verdicts(suite, tokenizer, seed)
            return _PreparedSuite(suite, partial(run_verdicts, suite, comparisons), bad_rows)
        case MultipleChoiceSuite():
            questions, bad_rows = load_choices(suite, tokenizer)
            return _PreparedSuite(suite, partial(run_choices, questions), bad_rows)
        case NeedleSuite():
            return _PreparedSuite(suite, partial(run_needles, load_needles(suite, tokenizer, seed)))
        case TextSuite():
            return _PreparedSuite(suite, partial(run_text, load_text(suite, tokenizer)))
        case LMEvalSuite():
            return _PreparedSuite(suite, partial(run_harness, suite, load_harness(suite), tokenizer))
