"""Verifiable instructions, prompt by prompt and instruction by instruction."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.data.prompts import Prompts
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.speaking import rates, record
from pipeline.evaluation.suites import Items, Record, Session, SuiteResult, result, watched
from rewards.types import Task, Verdict
from rollout.types import Group

MODES = ("strict", "loose")


def instruction_task(row: Row) -> Task:
    """The task of a row in IFEval's form. Raises BadRowError where a column is missing or doesn't fit the others."""
    prompt, instructions, kwargs = (row.column(name) for name in ("prompt", "instruction_id_list", "kwargs"))
    if not isinstance(prompt, str):
        raise BadRowError("not a text", f"prompt={prompt!r}"[:120])
    if not isinstance(instructions, list) or not isinstance(kwargs, list) or len(instructions) != len(kwargs):
        raise BadRowError("instructions and kwargs don't pair up", f"{instructions!r}, {kwargs!r}"[:120])
    truth = {"instruction_id_list": instructions, "kwargs": kwargs}
    return Task(prompt, truth, kind=" ".join(MODES), row=row.where, metadata=row.values)


def run_ifeval(prompts: Prompts, session: Session) -> SuiteResult:
    """One greedy completion of every prompt, and whether it follows each of its instructions.

    IFEval's four accuracies (Zhou et al., arXiv:2311.07911, section 3): `prompt_strict` and `prompt_loose`, the share
    of prompts all of whose instructions are followed, with intervals; `instruction_strict` and `instruction_loose`, the
    share of instructions, which have none: those of one prompt depend on each other. An instruction's item id is its
    row's and its place. A prompt counts where all its instructions were judged.
    """
    assert session.rewards is not None
    asked = [prompts[i] for i in range(len(prompts))]
    parts = [_one_by_one(prompt.task) for prompt in asked]
    places = [(i, place) for i, tasks in enumerate(parts) for place in range(len(tasks))]
    number = {place: index for index, place in enumerate(places)}
    groups: dict[int, Group] = {}
    stream = session.rollout.generate([prompt.token_ids for prompt in asked], session.greedy, 1, session.seed)
    for group in watched(stream, "ifeval, greedy", len(asked)):
        groups[group.index] = group
        for place, task in enumerate(parts[group.index]):
            session.rewards.submit(number[group.index, place], task, [group.completions[0].text])
    judged = session.rewards.gather()
    records = [
        _record(i, prompt.task, groups[i], [judged[number[i, place]][0] for place in range(len(parts[i]))])
        for i, prompt in enumerate(asked)
    ]
    return ifeval_result(records)


def ifeval_result(records: Sequence[Record]) -> SuiteResult:
    """The figures of `run_ifeval`, from records whose `parts` are `<mode>:<place>:<instruction>`."""
    items: dict[str, Items] = {f"{level}_{mode}": {} for level in ("prompt", "instruction") for mode in MODES}
    for of_prompt in records:
        for mode in MODES:
            scores = {part: score for part, score in of_prompt.parts.items() if part.startswith(f"{mode}:")}
            given = {part.split(":")[1]: score for part, score in scores.items() if score is not None}
            items[f"instruction_{mode}"] |= {f"{of_prompt.row}#{place}": score for place, score in given.items()}
            if len(given) == len(scores):
                items[f"prompt_{mode}"][of_prompt.row] = float(all(given.values()))
    return result(items, [f"prompt_{mode}" for mode in MODES], rates(records), records)


def _one_by_one(task: Task) -> list[Task]:
    """A task for each of the instructions."""
    pairs = zip(task.truth["instruction_id_list"], task.truth["kwargs"], strict=True)
    return [
        replace(task, truth={"instruction_id_list": [name], "kwargs": [given]}, row=f"{task.row}#{place}")
        for place, (name, given) in enumerate(pairs)
    ]


def _record(index: int, task: Task, group: Group, judged: Sequence[Mapping[str, Verdict]]) -> Record:
    """The record of one prompt: its score says whether every instruction is followed, strictly."""
    worst = min((verdicts["strict"] for verdicts in judged), key=_badness)
    names = task.truth["instruction_id_list"]
    parts = {f"{mode}:{place}:{names[place]}": of[mode].score for mode in MODES for place, of in enumerate(judged)}
    detail = "; ".join(of["strict"].detail for of in judged if of["strict"].detail)
    return replace(record(index, task, group, 0, "greedy", {"strict": worst}), parts=parts, detail=detail)


def _badness(verdict: Verdict) -> float:
    """Lowest for a verdict without a score, then by score."""
    return -1.0 if verdict.score is None else verdict.score
