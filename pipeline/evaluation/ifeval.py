"""Verifiable instructions, judged by prompt and by instruction."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.data.prompts import Prompts
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.generation import completion_record, rates
from pipeline.evaluation.suites import CompletionRecord, Items, Session, SuiteResult, suite_result, with_progress
from rewards.types import Task, Verdict
from rollout.types import StoredGroup

MODES = ("strict", "loose")


def instruction_task(row: Row) -> Task:
    """Make the task of a row in IFEval's form. Raises BadRowError for a missing column, or columns that don't match."""
    prompt, instructions, kwargs = (row.column(name) for name in ("prompt", "instruction_id_list", "kwargs"))
    if not isinstance(prompt, str):
        raise BadRowError("not a text", f"prompt={prompt!r}"[:120])
    if not isinstance(instructions, list) or not isinstance(kwargs, list) or len(instructions) != len(kwargs):
        raise BadRowError("instructions and kwargs don't pair up", f"{instructions!r}, {kwargs!r}"[:120])
    truth = {"instruction_id_list": instructions, "kwargs": kwargs}
    return Task(prompt, truth, kind=" ".join(MODES), row=row.where, metadata=row.values)


def run_ifeval(prompts: Prompts, session: Session) -> SuiteResult:
    """Generate one greedy completion of every prompt and check each of its instructions.

    The figures are IFEval's four accuracies (Zhou et al., arXiv:2311.07911, section 3). `prompt_strict` and
    `prompt_loose` are the shares of prompts with all instructions followed, with intervals; a prompt counts where all
    its instructions were judged. `instruction_strict` and `instruction_loose` are the shares of instructions, without
    intervals, since those of one prompt depend on each other. An instruction's item id is its row and its index.
    """
    assert session.rewards is not None, "a suite that generates has judges"
    tasks = [_single_tasks(prompt.task) for prompt in prompts]
    places = [(index, place) for index, of_prompt in enumerate(tasks) for place in range(len(of_prompt))]
    numbers = {place: number for number, place in enumerate(places)}
    groups: dict[int, StoredGroup] = {}
    stream = session.rollout.generate([prompt.token_ids for prompt in prompts], session.greedy, 1, session.seed)
    for group in with_progress(stream, "ifeval, greedy", len(prompts)):
        groups[group.index] = group
        for place, task in enumerate(tasks[group.index]):
            session.rewards.submit(numbers[group.index, place], task, [group.completions[0].text])
    group_verdicts = session.rewards.gather()
    return ifeval_result(
        [
            _record(i, prompt.task, groups[i], [group_verdicts[numbers[i, place]][0] for place in range(len(tasks[i]))])
            for i, prompt in enumerate(prompts)
        ]
    )


def ifeval_result(records: Sequence[CompletionRecord]) -> SuiteResult:
    """Return the figures of `run_ifeval`, from records whose `parts` are `<mode>:<index>:<instruction>`."""
    items: dict[str, Items] = {f"{level}_{mode}": {} for level in ("prompt", "instruction") for mode in MODES}
    for record in records:
        for mode in MODES:
            parts = {part: score for part, score in record.parts.items() if part.startswith(f"{mode}:")}
            scores = {part.split(":")[1]: score for part, score in parts.items() if score is not None}
            items[f"instruction_{mode}"] |= {f"{record.row}#{place}": score for place, score in scores.items()}
            if len(scores) == len(parts):
                items[f"prompt_{mode}"][record.row] = float(all(scores.values()))
    return suite_result(items, [f"prompt_{mode}" for mode in MODES], rates(records), records)


def _single_tasks(task: Task) -> list[Task]:
    """Split a task into one task for each instruction."""
    pairs = zip(task.truth["instruction_id_list"], task.truth["kwargs"], strict=True)
    return [
        replace(task, truth={"instruction_id_list": [name], "kwargs": [kwargs]}, row=f"{task.row}#{place}")
        for place, (name, kwargs) in enumerate(pairs)
    ]


def _record(index: int, task: Task, group: StoredGroup, checks: Sequence[Mapping[str, Verdict]]) -> CompletionRecord:
    """Record one prompt. Its score says whether every instruction is followed, strictly."""
    names, strict = task.truth["instruction_id_list"], [verdicts["strict"] for verdicts in checks]
    # A missing score is worse than 0, so that one unjudged instruction leaves the prompt unjudged.
    worst = min(strict, key=lambda verdict: -1.0 if verdict.score is None else verdict.score)
    parts = {
        f"{mode}:{place}:{names[place]}": verdicts[mode].score
        for mode in MODES
        for place, verdicts in enumerate(checks)
    }
    detail = "; ".join(verdict.detail for verdict in strict if verdict.detail)
    record = completion_record(index, task, group, 0, "greedy", {"strict": worst})
    return replace(record, parts=parts, detail=detail)
