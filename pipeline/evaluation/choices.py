"""Multiple choice by likelihood."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from transformers import PreTrainedTokenizerFast

from configs.evaluation import MultipleChoiceSuite
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows
from pipeline.evaluation.suites import Items, Record, Session, SuiteResult, likelihoods, result
from rewards.types import Status
from rollout.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Question:
    """A context, the choices that may follow it, each with the blank before it, and the place of the right one.

    `subject`: whose examples may stand before it; "" for everybody's.
    """

    row: str
    context: str
    choices: list[str]
    answer: int
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """A question as token ids: those of context and examples, and of each choice."""

    question: Question
    context_ids: list[int]
    choice_ids: list[list[int]]


def load_choices(suite: MultipleChoiceSuite, tokenizer: PreTrainedTokenizerFast) -> tuple[list[Scored], BadRows]:
    """The questions of `suite.source`, each behind its examples and, where the tokenizer has one, the token that begins
    a sequence. Context and choice are tokenised apart, so the choice's tokens are the same whatever it follows.

    Raises ValueError when a source can't be read, or too many of its rows are bad.
    """
    bad_rows, read = BadRows(), _FORMS[suite.form]
    shots: dict[str, str] = {} if suite.shots_source is None else _shots(suite, read)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    questions: list[Scored] = []
    for row in read_rows(suite.source, bad_rows):
        try:
            question = read(row)
            if suite.shots and question.subject not in shots:
                raise BadRowError("no examples", f"shots_source has none of subject '{question.subject}'")
            texts = [_header(question) + shots.get(question.subject, "") + question.context, *question.choices]
            context_ids, *choice_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            context_ids = begin + context_ids
            if not context_ids or not all(choice_ids):
                raise BadRowError("empty context or choice")
            longest = len(context_ids) + max(map(len, choice_ids))
            if longest > suite.max_length:
                raise BadRowError("longer than max_length", f"{longest} tokens > {suite.max_length}")
            questions.append(Scored(question, context_ids, choice_ids))
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(suite.max_bad_share)
    return questions, bad_rows


def run_choices(questions: Sequence[Scored], session: Session) -> SuiteResult:
    """Every choice scored behind its context, and the likeliest taken. For the figures see `choices_result`."""
    sequences = [scored.context_ids + ids for scored in questions for ids in scored.choice_ids]
    starts = [len(scored.context_ids) for scored in questions for _ in scored.choice_ids]
    answers = likelihoods(session.rollout, sequences, starts, "choices")
    return choices_result([(scored.question, [next(answers) for _ in scored.choice_ids]) for scored in questions])


def choices_result(answered: Iterable[tuple[Question, Sequence[TokenLogprobs]]]) -> SuiteResult:
    """`accuracy`, where the likeliest choice is the answer; `accuracy_per_byte` and `accuracy_per_token`, where the
    likeliest is that of the highest log-probability per byte of its text, or per token. All with intervals."""
    items: dict[str, Items] = {"accuracy": {}, "accuracy_per_byte": {}, "accuracy_per_token": {}}
    records: list[Record] = []
    for index, (question, choices) in enumerate(answered):
        sums = [sum(choice.logprobs) for choice in choices]
        num_bytes = [len(choice.strip().encode()) for choice in question.choices]
        num_tokens = [len(choice.logprobs) for choice in choices]
        for name, sizes in zip(items, ([1] * len(sums), num_bytes, num_tokens), strict=True):
            chosen = _likeliest([total / size for total, size in zip(sums, sizes, strict=True)])
            items[name][question.row] = float(chosen == question.answer)
        chosen = _likeliest(sums)
        records.append(
            Record(
                index=index,
                row=question.row,
                prompt=question.context,
                truth=question.choices[question.answer].strip(),
                completion=question.choices[chosen].strip(),
                mode="greedy",
                score=float(chosen == question.answer),
                status=Status.OK,
                outcome="right" if chosen == question.answer else "wrong",
                detail="",
                num_tokens=num_tokens[chosen],
                truncated=False,
                parts={f"{place} {text.strip()}": sums[place] for place, text in enumerate(question.choices)},
            )
        )
    return result(items, list(items), {}, records)


def _likeliest(values: Sequence[float]) -> int:
    """The first of the highest."""
    return max(range(len(values)), key=lambda place: values[place])


def _shots(suite: MultipleChoiceSuite, read: Callable[[Row], Question]) -> dict[str, str]:
    """By subject the first examples, answered, one after the other. Raises ValueError for a bad row among them."""
    assert suite.shots_source is not None
    of_subject: dict[str, list[str]] = {}
    for row in read_rows(suite.shots_source, bad_rows := BadRows()):
        try:
            question = read(row)
            texts = of_subject.setdefault(question.subject, [])
            if len(texts) < suite.shots:
                texts.append(f"{question.context}{question.choices[question.answer]}\n\n")
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(0)
    for subject, texts in of_subject.items():
        if len(texts) < suite.shots:
            raise ValueError(f"shots={suite.shots}: shots_source has only {len(texts)} of subject '{subject}'")
    return {subject: "".join(texts) for subject, texts in of_subject.items()}


def _header(question: Question) -> str:
    """MMLU's first line (Hendrycks et al., arXiv:2009.03300)."""
    if not question.subject:
        return ""
    subject = question.subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _mmlu(row: Row) -> Question:
    """The choices are listed under letters, and a letter is the answer."""
    question, choices, answer = (row.column(name) for name in ("question", "choices", "answer"))
    choices = _texts(choices, "choices")
    letters = ascii_uppercase[: len(choices)]
    lines = [str(question).strip(), *(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))]
    place = letters.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    return Question(
        row.where,
        "\n".join([*lines, "Answer:"]),
        [f" {letter}" for letter in letters],
        _place(place, choices),
        str(row.values.get("subject") or ""),
    )


def _hellaswag(row: Row) -> Question:
    """WikiHow's headings, "[header]", "[title]" and the like, are taken out, as is customary."""
    context, endings, label = row.column("ctx"), _texts(row.column("endings"), "endings"), row.column("label")
    activity = row.values.get("activity_label")
    place = int(label) if isinstance(label, str) and label.isdigit() else label
    context = _plain(f"{activity}: {context}" if activity else str(context))
    return Question(row.where, context, [f" {_plain(ending)}" for ending in endings], _place(place, endings))


def _plain(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text for text in value):
        raise BadRowError("no list of choices", f"{name}={value!r}"[:120])
    return value


def _place(place: Any, choices: Sequence[str]) -> int:
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices):
        raise BadRowError("no such choice", f"the answer is {place!r}, of {len(choices)} choices")
    return place


_FORMS: dict[str, Callable[[Row], Question]] = {"mmlu": _mmlu, "hellaswag": _hellaswag}
