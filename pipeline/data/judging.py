"""Prompts that ask a judge for a verdict, made of comparisons whose order is known (SPCT, arXiv:2504.02495)."""

import random
from typing import Any

from configs.judging import VerdictForm
from pipeline.data.comparisons import Comparison
from pipeline.data.rows import BadRowError
from rewards.judging.rubric import Rubric, written_scores
from rewards.types import Task


def judging_rows(comparison: Comparison, rubric: Rubric, seed: int) -> list[dict[str, Any]]:
    """Turn a comparison into rows `prompt`, `truth` and `messages`, with its source, domain and row.

    A prompt shows the best answer and others, in an order drawn by the seed: so many that each of the others is in one
    prompt. With `compare` 1 each answer has a prompt, and its score is the label. `truth` is that of the reward
    `verdict`. `messages` is the prompt with a verdict to begin from: the best answer, then the highest score for it and
    the lowest for the others; for a label, or in JSON, the scores alone.

    Raises BadRowError for a comparison without a single best answer or without labels in the judge's range, and for one
    that lacks the truth or rubric that the prompt shows.
    """
    task = judged_task(comparison, rubric)
    rows: list[dict[str, Any]] = []
    if rubric.compare == 1:
        for answer, label in zip(comparison.answers, _labels(comparison, rubric), strict=True):
            question, truth = rubric.question(task, answer), {"best": None, "label": label, "answers": 1}
            rows.append(_row(comparison, rubric, question, truth, written_scores([label], rubric)))
        return rows
    for answers in slates(comparison, rubric.compare, seed):
        order = random.Random(f"{seed}/{comparison.row}/{answers}").sample(range(len(answers)), len(answers))
        scores = written_scores([rubric.lowest if index else rubric.highest for index in order], rubric)
        verdict = scores if rubric.form == "json" else f"{answers[0]}\n{scores}"
        question = rubric.question(task, *(answers[index] for index in order))
        truth = {"best": order.index(0) + 1, "label": None, "answers": len(answers)}
        rows.append(_row(comparison, rubric, question, truth, verdict))
    return rows


def judged_task(comparison: Comparison, rubric: Rubric) -> Task:
    """Make the task of a comparison's answers. Raises BadRowError where it lacks what the rubric shows."""
    messages, values = comparison.messages, comparison.values
    task = Task(messages[-1]["content"], values.get("truth"), row=comparison.row, metadata=values, messages=messages)
    try:
        rubric.check(task)
    except ValueError as error:
        raise BadRowError("cannot be judged", str(error)) from error
    return task


def slates(comparison: Comparison, compare: int, seed: int) -> list[list[str]]:
    """Deal the answers below the best into lists of at most `compare` that each begin with the best answer.

    Raises BadRowError for a comparison without a single best answer.
    """
    if len(comparison.answers) == 1 or (comparison.scores and comparison.scores[0] == comparison.scores[1]):
        raise BadRowError("no single best answer", f"scores {comparison.scores}")
    best, *others = comparison.answers
    others = random.Random(f"{seed}/{comparison.row}").sample(others, len(others))
    return [[best, *others[first : first + compare - 1]] for first in range(0, len(others), compare - 1)]


def _labels(comparison: Comparison, rubric: Rubric) -> list[float]:
    labels = comparison.scores
    if labels is None or not all(rubric.lowest <= label <= rubric.highest for label in labels):
        raise BadRowError("no scores in the judge's range", f"{labels}, not in {rubric.lowest:g} to {rubric.highest:g}")
    return labels


def _row(
    comparison: Comparison, rubric: Rubric, question: list[dict[str, str]], truth: dict[str, Any], verdict: str
) -> dict[str, Any]:
    return {
        "prompt": question,
        "truth": truth | {"form": rubric.model_dump(include=set(VerdictForm.model_fields))},
        "messages": [*question, {"role": "assistant", "content": verdict}],
        "source": comparison.source,
        "domain": comparison.domain,
        "row": comparison.row,
    }
