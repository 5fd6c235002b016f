"""Suites that speak: rows made into prompts, completions of them, and their verdicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from configs.evaluation import PromptedSuite
from pipeline.data.chat import ChatFormat
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows
from pipeline.evaluation.suites import Mode, Record, Session, watched
from rewards.types import Task, Verdict
from rollout.types import Group


def load_prompts(
    suite: PromptedSuite, tokenizer: PreTrainedTokenizerFast, task_of: Callable[[Row], Task], seed: int
) -> Prompts:
    """A prompt of each row of the suite's source: the conversation of the task that `task_of` makes of it.

    `task_of` raises BadRowError for a row it can't read. Raises ValueError as `Prompts.load` does.
    """
    chat, bad_rows, prompts = ChatFormat(tokenizer), BadRows(), []
    for row in read_rows(suite.source, bad_rows):
        try:
            task = task_of(row)
            token_ids = chat.prompt_ids(chat.check(task.conversation, last_role="user"))
            if len(token_ids) > suite.max_prompt_length:
                excess = f"{len(token_ids)} tokens > {suite.max_prompt_length}"
                raise BadRowError("longer than max_prompt_length", excess)
            prompts.append(Prompt(token_ids, task))
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(suite.max_bad_share)
    return Prompts(prompts, bad_rows, seed)


def speak(prompts: Sequence[Prompt], session: Session, mode: Mode, num_completions: int, title: str) -> list[Record]:
    """Completions of every prompt, in the prompts' order; a group is judged while others are still being written.

    The rewards that a task's `kind` names judge it; the score of a record is the first one's.
    """
    assert session.rewards is not None, "a suite that speaks is judged"
    groups: dict[int, Group] = {}
    sampling = session.greedy if mode == "greedy" else session.sampling
    asked = [prompt.token_ids for prompt in prompts]
    stream = session.rollout.generate(asked, sampling, num_completions, session.seed)
    for group in watched(stream, f"{title}, {mode}", len(asked)):
        groups[group.index] = group
        completions = [completion.text for completion in group.completions]
        session.rewards.submit(group.index, prompts[group.index].task, completions)
    judged = session.rewards.gather()
    return [
        record(i, prompt.task, group, place, mode, verdicts)
        for i, prompt in enumerate(prompts)
        for group in [groups[i]]
        for place, verdicts in enumerate(judged[i])
    ]


def record(index: int, task: Task, group: Group, place: int, mode: Mode, verdicts: Mapping[str, Verdict]) -> Record:
    """The record of a group's completion at `place`. Its `score` is that of the first reward the task's kind names."""
    completion, verdict = group.completions[place], verdicts[task.kind.split()[0]]
    return Record(
        index=index,
        row=task.row,
        prompt=task.prompt,
        truth=task.truth,
        completion=completion.text,
        mode=mode,
        score=verdict.score,
        status=verdict.status,
        outcome=verdict.outcome,
        detail=verdict.detail,
        num_tokens=len(completion.token_ids),
        truncated=completion.finish_reason == "length",
        parts={label: of_reward.score for label, of_reward in verdicts.items()} if len(verdicts) > 1 else {},
    )


def judged_by(prompts: Sequence[Prompt], kind: str) -> list[Prompt]:
    """The prompts, judged by the rewards that `kind` names, whatever their rows say."""
    return [replace(prompt, task=replace(prompt.task, kind=kind)) for prompt in prompts]


def rates(records: Sequence[Record]) -> dict[str, float]:
    """Over all completions: `mean_length` in tokens, `truncated_rate`, `unjudged_rate`."""
    if not records:
        return {}
    return {
        "mean_length": sum(record.num_tokens for record in records) / len(records),
        "truncated_rate": sum(record.truncated for record in records) / len(records),
        "unjudged_rate": sum(record.score is None for record in records) / len(records),
    }
