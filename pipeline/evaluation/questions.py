"""Questions made of a row's columns, with worked examples."""

from collections.abc import Callable

from configs.evaluation import QuestionSuite
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.shots import read_shots, with_shots
from rewards.types import Task


def question_task(suite: QuestionSuite) -> Callable[[Row], Task]:
    """Return a function from a row to its task. It raises BadRowError for a row without a column that the texts name.

    Raises ValueError for a bad example.
    """

    def answer_of(row: Row) -> str:
        answer = _text(suite.answer, row)
        if suite.labels and answer not in suite.labels:
            raise BadRowError("unknown label", f"{answer!r} is none of {', '.join(suite.labels)}"[:120])
        return suite.labels.get(answer, answer)

    def example(row: Row) -> tuple[str, str]:
        return _text(suite.question, row), _text(suite.shown, row) if suite.shown else answer_of(row)

    shots = read_shots(suite, example)

    def task_of(row: Row) -> Task:
        task = Task(_text(suite.question, row), answer_of(row), suite.reward.label, row.where, row.values)
        return with_shots(task, shots)

    return task_of


def _text(form: str, row: Row) -> str:
    """Fill in the columns that `form` names."""
    try:
        text = form.format_map(row.values).strip()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BadRowError("missing field", f"'{form}' needs {error}; the row has {sorted(row.values)}"[:200]) from error
    if not text:
        raise BadRowError("not a text", f"'{form}' is empty"[:120])
    return text
