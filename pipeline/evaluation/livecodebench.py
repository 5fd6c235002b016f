"""Rows of LiveCodeBench as tasks of the reward `code`, within a window of dates."""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable
from datetime import date, datetime
from typing import Any

from configs.program_suites import LiveCodeBenchSuite
from pipeline.data.rows import BadRowError, Row
from rewards.types import Task

_SETUP = "from typing import *\nfrom collections import *\nfrom heapq import *\nimport math"
"""Names that starter code uses without importing them."""
_UNREADABLE = (AttributeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError, zlib.error)
"""Raised by tests in another form; binascii's error is a ValueError."""
_COMPARE = """\
def plain(value):
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def check(candidate):
"""
_READS = "{question}\n\nWrite a Python program, in one block of code, that reads standard input and prints the answer."
_COMPLETES = (
    "{question}\n\nComplete this Python code. Give the whole class in one block of code.\n\n```python\n{starter}\n```"
)


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values. A pickle may name any function to call, so one that names anything is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def contest_task(suite: LiveCodeBenchSuite) -> Callable[[Row], Task | None]:
    """Return a function from a row to its task; to None for a problem outside of the suite's window.

    It raises BadRowError for a row without a date or tests in the published form.
    """

    def task_of(row: Row) -> Task | None:
        day = _day(row.column("contest_date"))
        if (suite.since and day < suite.since) or (suite.until and day > suite.until):
            return None
        tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
        if not tests:
            raise BadRowError("no tests")
        starter = str(row.values.get("starter_code") or "").strip()
        form = (_COMPLETES if starter else _READS).format(question=row.column("question_content"), starter=starter)
        truth = _function_truth(row, tests) if starter else _program_truth(tests)
        kept = ("question_id", "difficulty", "platform")
        metadata = {"contest_date": day} | {name: row.values.get(name) for name in kept}
        return Task(form, truth, row=row.where, metadata=metadata)

    return task_of


def _program_truth(tests: list[dict[str, str]]) -> dict[str, Any]:
    return {"language": "python", "cases": [{"stdin": test["input"], "stdout": test["output"]} for test in tests]}


def _function_truth(row: Row, tests: list[dict[str, str]]) -> dict[str, Any]:
    """Call the method with the JSON values of each line of a test's input."""
    lines: list[str] = []
    try:
        name = json.loads(row.column("metadata"))["func_name"]
        for test in tests:
            arguments = ", ".join(repr(json.loads(line)) for line in test["input"].splitlines() if line.strip())
            lines.append(f"    assert plain(candidate({arguments})) == {json.loads(test['output'])!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise BadRowError("no tests of a function", f"{type(error).__name__}: {error}"[:120]) from error
    source = _COMPARE + "\n".join(lines)
    return {"language": "python", "tests": source, "entry_point": f"Solution().{name}", "setup": _SETUP}


def _tests(row: Row, column: str) -> list[dict[str, str]]:
    """Read a column of tests: JSON, or base64 of a compressed pickle of JSON."""
    value = row.values.get(column) or "[]"
    try:
        if not value.lstrip().startswith("["):
            value = _PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
        return [{"input": str(test["input"]), "output": str(test["output"])} for test in json.loads(value)]
    except _UNREADABLE as error:
        raise BadRowError("unreadable tests", f"{column}: {error}"[:120]) from error


def _day(value: Any) -> str:
    if isinstance(value, date):  # a datetime is one too
        return (value.date() if isinstance(value, datetime) else value).isoformat()
    try:
        return datetime.fromisoformat(str(value)).date().isoformat()
    except ValueError as error:
        raise BadRowError("no date", f"contest_date={value!r}"[:120]) from error
