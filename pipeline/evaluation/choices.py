"""Multiple choice by the likelihood of each choice."""
# ruff: noqa: RUF001  Chinese punctuation

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from transformers import PreTrainedTokenizerFast

from configs.data import Source
from configs.evaluation import MultipleChoiceSuite
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows
from pipeline.evaluation.suites import CompletionRecord, Items, Session, SuiteResult, batched_likelihoods, suite_result
from rollout.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Question:
    """A context, the choices that may follow it, each with its leading space, and the index of the right one."""

    row: str
    context: str
    choices: list[str]
    answer: int
    subject: str = ""
    """The subject of the examples before it; "" where examples have none."""


@dataclass(frozen=True, slots=True)
class TokenizedQuestion:
    """A question as token ids: examples with context, and each choice."""

    question: Question
    context_ids: list[int]
    choice_ids: list[list[int]]


def load_choices(
    suite: MultipleChoiceSuite, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[TokenizedQuestion], BadRows]:
    """Load the questions of `suite.source`, each after its examples and the token that begins a sequence, if any.

    Context and choice are tokenised apart, so a choice's tokens do not depend on its context. Raises ValueError for an
    unreadable source or too many bad rows.
    """
    bad_rows, read = BadRows(), _FORMS[suite.form]
    shots = _shots(suite.shots_source, suite.shots, read) if suite.shots_source else {}
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    questions: list[TokenizedQuestion] = []
    for row in read_rows(suite.source, bad_rows):
        try:
            question = read(row)
            if suite.shots and question.subject not in shots:
                raise BadRowError("no examples", f"shots_source has none of subject '{question.subject}'")
            texts = [
                _HEADERS[suite.form](question.subject) + shots.get(question.subject, "") + question.context,
                *question.choices,
            ]
            context_ids, *choice_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            context_ids = begin + context_ids
            if not context_ids or not all(choice_ids):
                raise BadRowError("empty context or choice")
            longest = len(context_ids) + max(map(len, choice_ids))
            if longest > suite.max_length:
                raise BadRowError("longer than max_length", f"{longest} tokens > {suite.max_length}")
            questions.append(TokenizedQuestion(question, context_ids, choice_ids))
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(suite.max_bad_share)
    return questions, bad_rows


def run_choices(questions: Sequence[TokenizedQuestion], session: Session) -> SuiteResult:
    """Score every choice after its context. See `choices_result` for the figures."""
    sequences = [tokenized.context_ids + ids for tokenized in questions for ids in tokenized.choice_ids]
    starts = [len(tokenized.context_ids) for tokenized in questions for _ in tokenized.choice_ids]
    scored = batched_likelihoods(session.rollout, sequences, starts, "choices")
    return choices_result(
        [(tokenized.question, [next(scored) for _ in tokenized.choice_ids]) for tokenized in questions]
    )


def choices_result(answered: Iterable[tuple[Question, Sequence[TokenLogprobs]]]) -> SuiteResult:
    """Return `accuracy`, `accuracy_per_byte` and `accuracy_per_token`, with intervals.

    They are the shares of questions whose answer has the highest log-probability in all, per byte of its text, or per
    token.
    """
    items: dict[str, Items] = {"accuracy": {}, "accuracy_per_byte": {}, "accuracy_per_token": {}}
    records: list[CompletionRecord] = []
    for index, (question, choices) in enumerate(answered):
        sums = [sum(choice.logprobs) for choice in choices]
        num_bytes = [len(choice.strip().encode()) for choice in question.choices]
        num_tokens = [len(choice.logprobs) for choice in choices]
        for name, sizes in zip(items, ([1] * len(sums), num_bytes, num_tokens), strict=True):
            chosen = _likeliest([total / size for total, size in zip(sums, sizes, strict=True)])
            items[name][question.row] = float(chosen == question.answer)
        chosen = _likeliest(sums)
        records.append(
            CompletionRecord(
                index=index,
                row=question.row,
                prompt=question.context,
                truth=question.choices[question.answer].strip(),
                completion=question.choices[chosen].strip(),
                score=float(chosen == question.answer),
                outcome="right" if chosen == question.answer else "wrong",
                num_tokens=num_tokens[chosen],
                parts={f"{index} {text.strip()}": sums[index] for index, text in enumerate(question.choices)},
            )
        )
    return suite_result(items, list(items), {}, records)


def _likeliest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def _shots(source: Source, shots: int, read: Callable[[Row], Question]) -> dict[str, str]:
    """Return the first answered examples of each subject as one text. Raises ValueError for a bad row."""
    examples: dict[str, list[str]] = {}
    for row in read_rows(source, bad_rows := BadRows()):
        try:
            question = read(row)
            texts = examples.setdefault(question.subject, [])
            if len(texts) < shots:
                texts.append(f"{question.context}{question.choices[question.answer]}\n\n")
        except BadRowError as error:
            bad_rows.add(row.where, error)
    bad_rows.check(0)
    for subject, texts in examples.items():
        if len(texts) < shots:
            raise ValueError(f"shots={shots}: shots_source has only {len(texts)} of subject '{subject}'")
    return {subject: "".join(texts) for subject, texts in examples.items()}


def _mmlu(row: Row) -> Question:
    """List the choices under letters; the answer is a letter."""
    question, choices, answer = (row.column(name) for name in ("question", "choices", "answer"))
    choices = _texts(choices, "choices")
    letters = ascii_uppercase[: len(choices)]
    lines = [str(question).strip(), *(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))]
    index = letters.find(answer) if isinstance(answer, str) and len(answer) == 1 else answer
    return Question(
        row.where,
        "\n".join([*lines, "Answer:"]),
        [f" {letter}" for letter in letters],
        _checked_index(index, choices),
        str(row.values.get("subject") or ""),
    )


def _hellaswag(row: Row) -> Question:
    """Remove WikiHow's headings ("[header]", "[title]", ...), as is customary."""
    context, endings, label = row.column("ctx"), _texts(row.column("endings"), "endings"), row.column("label")
    activity = row.values.get("activity_label")
    index = int(label) if isinstance(label, str) and label.isdigit() else label
    context = _plain(f"{activity}: {context}" if activity else str(context))
    return Question(row.where, context, [f" {_plain(ending)}" for ending in endings], _checked_index(index, endings))


def _ceval(row: Row) -> Question:
    """List the choices under letters, in the frame of C-Eval (Huang et al., arXiv:2305.08322)."""
    columns = Row(row.where, {name.lower(): value for name, value in row.values.items()})
    choices = [str(columns.column(letter)) for letter in "abcd"]
    lines = [
        str(columns.column("question")).strip(),
        *(f"{letter}. {t}" for letter, t in zip("ABCD", choices, strict=True)),
    ]
    index = "ABCD".find(str(columns.column("answer")).strip() or "?")
    return Question(
        row.where,
        "\n".join([*lines, "答案："]),
        list("ABCD"),
        _checked_index(index, choices),
        str(columns.values.get("subject") or ""),
    )


def _plain(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) and text for text in value):
        raise BadRowError("no list of choices", f"{name}={value!r}"[:120])
    return value


def _checked_index(index: Any, choices: Sequence[str]) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise BadRowError("no such choice", f"the answer is {index!r}, of {len(choices)} choices")
    return index


_FORMS: dict[str, Callable[[Row], Question]] = {"mmlu": _mmlu, "hellaswag": _hellaswag, "ceval": _ceval}


def _english_header(subject: str) -> str:
    """Return MMLU's first line (Hendrycks et al., arXiv:2009.03300)."""
    subject = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""


def _chinese_header(subject: str) -> str:
    """Return the first line of C-Eval; `subject` as the rows name it."""
    of_subject = f"关于{subject.replace('_', ' ')}" if subject else ""
    return f"以下是中国{of_subject}考试的单项选择题，请选出其中的正确答案。\n\n"


_HEADERS: dict[str, Callable[[str], str]] = {
    "mmlu": _english_header,
    "hellaswag": lambda _: "",
    "ceval": _chinese_header,
}
"""First line before a question of a subject, by form."""
