"""Answers of a checkpoint compared with those of baselines by a judge.

Shape suffixes: N prompts, M pairs of players. Player 0 is the checkpoint, the others are the baselines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerFast

from configs.pairwise import AnswersBaseline, PairwiseSuite
from configs.sampling import SamplingConfig
from configs.suites import BaseSuite
from pipeline.data.prompts import Prompts
from pipeline.data.rows import BadRowError, BadRows, read_rows
from pipeline.evaluation.generation import complete
from pipeline.evaluation.pairwise_figures import Judged, pairwise_result
from pipeline.evaluation.suites import CompletionRecord, Session, SuiteResult
from pipeline.evaluation.win_rates import preference, winner
from rewards.pool.guard import Judges
from rewards.types import Task, Verdict

if TYPE_CHECKING:
    from rewards.pool.workers import RewardPool
    from rollout.pool import RolloutPool

Answers = Mapping[str, str]
"""Answers of a baseline by the text of their prompt."""


@dataclass(frozen=True, slots=True)
class Contest:
    """Prompts that every baseline has answered."""

    prompts: Prompts
    answers: dict[str, list[str]]
    """Answers of each baseline, in the prompts' order."""


def baseline_prompts(suite: BaseSuite, tokenizer: PreTrainedTokenizerFast, seed: int) -> Prompts:
    """Load the prompts of a comparison as the chat template of this `tokenizer` renders them."""
    assert isinstance(suite, PairwiseSuite), "only comparisons have baselines"
    return Prompts.load(suite.prompts.model_copy(update={"truth": None}), tokenizer, seed)


def greedy_answers(
    prompts: Prompts, rollout: "RolloutPool", sampling: SamplingConfig, seed: int, title: str
) -> dict[str, str]:
    """Generate a greedy answer to every prompt, and return them by the prompt's text."""
    greedy = SamplingConfig(temperature=0.0, max_tokens=sampling.max_tokens)
    groups = complete([prompt.token_ids for prompt in prompts], rollout, greedy, 1, seed, f"answers of {title}")
    return {prompt.task.prompt: group.completions[0].text for prompt, group in zip(prompts, groups, strict=True)}


def load_contest(
    suite: PairwiseSuite,
    judges: Judges,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    checkpoint_answers: Mapping[str, Answers],
) -> Contest:
    """Load the prompts and every baseline's answers. A prompt without an answer of each is a bad row.

    checkpoint_answers: answers of the baselines that are checkpoints. Raises ValueError for an unreadable source or too
    many bad rows.
    """
    prompts = baseline_prompts(suite, tokenizer, seed)
    by_name = {
        name: _read_answers(baseline) if isinstance(baseline, AnswersBaseline) else checkpoint_answers[name]
        for name, baseline in suite.baselines.items()
    }
    # A rubric that shows the first answer needs a truth; the answer itself is known when the judge is asked.
    tasks = [replace(_task(prompt.task, suite), truth="" if suite.reads_both else None) for prompt in prompts]
    missing = [
        next((f"no answer of baseline '{name}'" for name in by_name if prompt.task.prompt not in by_name[name]), None)
        for prompt in prompts
    ]
    problems = [reason or problem for reason, problem in zip(missing, judges.problems(tasks), strict=True)]
    if suite.difficulty:
        problems = [
            problem or _number_problem(prompt.task, suite.difficulty)
            for prompt, problem in zip(prompts, problems, strict=True)
        ]
    good = prompts.without(problems, suite.prompts.max_bad_share)
    return Contest(good, {name: [answers[p.task.prompt] for p in good] for name, answers in by_name.items()})


def run_pairwise(suite: PairwiseSuite, contest: Contest, session: Session) -> SuiteResult:
    """Answer every prompt greedily, judge all pairs of answers, and return `pairwise_result`."""
    assert session.rewards is not None, "a comparison has a judge"
    prompts = list(contest.prompts)
    prompt_ids = [prompt.token_ids for prompt in prompts]
    groups = complete(prompt_ids, session.rollout, session.greedy, 1, session.seed, "answers")
    own = [group.completions[0] for group in groups]
    players = [[completion.text for completion in own], *contest.answers.values()]
    tasks = [_task(prompt.task, suite) for prompt in prompts]
    judged = (judge_pairs if suite.reads_both else score_answers)(suite, tasks, players, session.rewards)
    records = [
        CompletionRecord(
            index=index,
            row=task.row,
            prompt=task.prompt,
            truth={name: answers[index] for name, answers in contest.answers.items()},
            completion=completion.text,
            num_tokens=completion.num_tokens,
            truncated=completion.finish_reason == "length",
        )
        for index, (task, completion) in enumerate(zip(tasks, own, strict=True))
    ]
    return pairwise_result(suite, tasks, players, judged, records, session.seed)


def score_answers(
    suite: PairwiseSuite, tasks: Sequence[Task], players: Sequence[Sequence[str]], rewards: "RewardPool"
) -> Judged:
    """Score every answer by itself; the higher score wins. players: answers of each player, by prompt."""
    pairs = list(combinations(range(len(players)), 2))
    for index, task in enumerate(tasks):
        rewards.submit(index, task, [answers[index] for answers in players])
    verdicts = rewards.gather()
    preferences_NM, problems = np.full((len(tasks), len(pairs)), np.nan), dict[int, str]()
    for index in range(len(tasks)):
        judged = [group[suite.judge.label] for group in verdicts[index]]
        unjudged = [verdict.detail or str(verdict.status) for verdict in judged if verdict.score is None]
        if unjudged:
            problems[index] = unjudged[0]
        for column, (i, j) in enumerate(pairs):
            first, second = judged[i].score, judged[j].score
            if first is not None and second is not None:
                preferences_NM[index, column] = winner(first, second, suite.tie)
    return Judged(preferences_NM, [], problems)


def judge_pairs(
    suite: PairwiseSuite, tasks: Sequence[Task], players: Sequence[Sequence[str]], rewards: "RewardPool"
) -> Judged:
    """Judge every pair of answers in both orders; a pair's preference is the mean of the two. Equal answers tie.

    A pair counts only if both orders were judged. players: answers of each player, by prompt.
    """
    pairs = list(combinations(range(len(players)), 2))
    places: dict[tuple[int, int], int] = {}
    for index, task in enumerate(tasks):
        for column, (i, j) in enumerate(pairs):
            first, second = players[i][index], players[j][index]
            if first != second:
                places[index, column] = 2 * len(places)
                rewards.submit(places[index, column], replace(task, truth=second), [first])
                rewards.submit(places[index, column] + 1, replace(task, truth=first), [second])
    verdicts = rewards.gather()
    preferences_NM = np.full((len(tasks), len(pairs)), 0.5)
    flips, problems = list[float](), dict[int, str]()
    for (index, column), place in places.items():
        own, other = (_share(suite, verdicts[place + order][0][suite.judge.label]) for order in (0, 1))
        if isinstance(own, str) or isinstance(other, str):
            problems[index] = own if isinstance(own, str) else str(other)
            preferences_NM[index, column] = np.nan
            continue
        preferences_NM[index, column] = (own + 1 - other) / 2
        flips.append(float((own - 0.5) * (other - 0.5) > 0))  # the answer that stands second wins twice, or loses
    return Judged(preferences_NM, flips, problems)


def _share(suite: PairwiseSuite, verdict: Verdict) -> float | str:
    """Return the share of a win of the answer that stands second, or why there is none."""
    if verdict.score is None:
        return verdict.detail or str(verdict.status)
    return preference(verdict.score, *suite.scale)


def _task(task: Task, suite: PairwiseSuite) -> Task:
    return replace(task, kind=suite.judge.label)


def _number_problem(task: Task, column: str) -> str | None:
    value = task.metadata.get(column)
    number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    return None if number else f"{column}={value!r} is no number"[:120]


def _read_answers(baseline: AnswersBaseline) -> dict[str, str]:
    """Read a baseline's answers by prompt; the first answer of a prompt counts. Raises ValueError for a bad row."""
    answers, bad_rows = dict[str, str](), BadRows()
    for row in read_rows(baseline.source, bad_rows):
        try:
            prompt, answer = row.column(baseline.prompt), row.column(baseline.answer)
            if not isinstance(prompt, str) or not isinstance(answer, str):
                raise BadRowError("not a text", f"{prompt!r}: {answer!r}"[:120])
            answers.setdefault(prompt, answer)
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(0)
    return answers
