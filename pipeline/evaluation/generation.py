"""Suites that generate: rows to prompts, prompts to completions, completions to verdicts."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from configs.sampling import SamplingConfig
from configs.suites import PromptedSuite
from pipeline.data.chat import ChatFormat
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.suites import CompletionRecord, DecodingMode, Session, with_progress
from rewards.types import Task, Verdict
from rollout.types import StoredGroup

if TYPE_CHECKING:
    from rollout.pool import RolloutPool

LONGEST_TRUTH = 20_000
"""Characters of a truth that a record keeps. A problem's hidden tests may have megabytes."""


def load_prompts(
    suite: PromptedSuite, tokenizer: PreTrainedTokenizerFast, task_of: Callable[[Row], Task | None], seed: int
) -> Prompts:
    """Load a prompt from each row of the suite's source: the conversation of the task that `task_of` makes of it.

    `task_of` raises BadRowError for a bad row, and returns None for one that the suite leaves out. Raises ValueError
    for an unreadable source, too many bad rows, or no row that is left.
    """
    chat = ChatFormat(tokenizer)

    def prompt_of(row: Row) -> Prompt | None:
        task = task_of(row)
        if task is None:
            return None
        token_ids = chat.prompt_ids(chat.check(task.conversation, last_role="user"))
        if len(token_ids) > suite.max_prompt_length:
            raise BadRowError("longer than max_prompt_length", f"{len(token_ids)} tokens > {suite.max_prompt_length}")
        return Prompt(token_ids, task)

    prompts = Prompts.read(suite.source, prompt_of, suite.max_bad_share, seed)
    if not len(prompts):
        raise ValueError("the suite leaves out every row of its source; widen its window of dates")
    return prompts


def complete(
    prompt_ids: list[list[int]],
    rollout: "RolloutPool",
    sampling: SamplingConfig,
    num_completions: int,
    seed: int,
    title: str,
    finished: Callable[[StoredGroup], None] = lambda _: None,
) -> list[StoredGroup]:
    """Generate completions of every prompt, and return the groups in the prompts' order.

    finished: called with each group as soon as the engines have finished it.
    """
    groups: dict[int, StoredGroup] = {}
    stream = rollout.generate(prompt_ids, sampling, num_completions, seed)
    for group in with_progress(stream, title, len(prompt_ids)):
        groups[group.index] = group
        finished(group)
    return [groups[index] for index in range(len(prompt_ids))]


def generate(
    prompts: Sequence[Prompt], session: Session, mode: DecodingMode, num_completions: int, title: str
) -> list[CompletionRecord]:
    """Generate completions of every prompt, and judge each group while the engines continue.

    Returns the records in the prompts' order. The rewards in a task's `kind` judge it; the first of them gives
    a record's score.
    """
    rewards = session.rewards
    assert rewards is not None, "a suite that generates has judges"

    def judge(group: StoredGroup) -> None:
        completions = [completion.text for completion in group.completions]
        rewards.submit(group.index, prompts[group.index].task, completions)

    sampling = session.greedy if mode == "greedy" else session.sampling
    prompt_ids = [prompt.token_ids for prompt in prompts]
    groups = complete(prompt_ids, session.rollout, sampling, num_completions, session.seed, f"{title}, {mode}", judge)
    group_verdicts = rewards.gather()
    return [
        completion_record(index, prompt.task, groups[index], place, mode, verdicts)
        for index, prompt in enumerate(prompts)
        for place, verdicts in enumerate(group_verdicts[index])
    ]


def completion_record(
    index: int, task: Task, group: StoredGroup, place: int, mode: DecodingMode, verdicts: Mapping[str, Verdict]
) -> CompletionRecord:
    """Record a group's completion at `place`. Its score is that of the first reward in the task's `kind`."""
    completion, verdict = group.completions[place], verdicts[task.kind.split()[0]]
    return CompletionRecord(
        index=index,
        row=task.row,
        prompt=task.prompt,
        truth=task.truth if len(text := str(task.truth)) <= LONGEST_TRUTH else f"({len(text)} characters)",
        completion=completion.text,
        mode=mode,
        score=verdict.score,
        status=verdict.status,
        outcome=verdict.outcome,
        detail=verdict.detail,
        num_tokens=completion.num_tokens,
        truncated=completion.finish_reason == "length",
        parts={label: verdicts[label].score for label in verdicts} if len(verdicts) > 1 else {},
    )


def rates(records: Sequence[CompletionRecord]) -> dict[str, float]:
    """Return `mean_length` in tokens, `truncated_rate` and `unjudged_rate` of all completions."""
    if not records:
        return {}
    return {
        "mean_length": sum(record.num_tokens for record in records) / len(records),
        "truncated_rate": sum(record.truncated for record in records) / len(records),
        "unjudged_rate": sum(record.score is None for record in records) / len(records),
    }
