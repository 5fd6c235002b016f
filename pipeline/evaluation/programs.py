"""Rows of HumanEval and MBPP as tasks of the reward `code`; `rewards.code.truth` documents their truth."""

import ast
from collections.abc import Callable

from configs.evaluation import HumanEvalSuite, MBPPSuite
from pipeline.data.rows import BadRowError, Row
from rewards.types import Task

_COMPLETE = (
    "Complete this Python function. Answer with the whole function, and whatever it needs, in one block of code.\n\n"
    "```python\n{prompt}\n```"
)
_WRITE = "{prompt}\n\nWrite it in Python, in one block of code, so that these tests pass:\n\n```python\n{tests}\n```"


def program_task(suite: HumanEvalSuite | MBPPSuite) -> Callable[[Row], Task]:
    """Return a function from a row to its task. It raises BadRowError for a row without a needed column."""
    return _human_eval if isinstance(suite, HumanEvalSuite) else _mbpp


def _human_eval(row: Row) -> Task:
    prompt, test, entry_point = (_text(row, name) for name in ("prompt", "test", "entry_point"))
    # The prompt may define functions that its tests use.
    truth = {"language": "python", "tests": test, "entry_point": entry_point, "setup": prompt}
    return Task(_COMPLETE.format(prompt=prompt.rstrip()), truth, row=row.where, metadata=row.values)


def _mbpp(row: Row) -> Task:
    """Take as entry points the functions and classes that `code` defines and the tests use."""
    prompt = _text(row, "text" if row.values.get("text") is not None else "prompt")
    tests, code = row.column("test_list"), _text(row, "code")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise BadRowError("no list of tests", f"test_list={tests!r}"[:120])
    imports = row.values.get("test_imports") or []
    setup = "\n".join([*imports, row.values.get("test_setup_code") or ""]).strip()
    try:
        defined = ast.parse(code.replace("\r\n", "\n")).body
        used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise BadRowError("not Python", str(error)) from error
    functions = [node.name for node in defined if isinstance(node, ast.FunctionDef) and node.name in used]
    classes = [node.name for node in defined if isinstance(node, ast.ClassDef) and node.name in used]
    if not functions:
        raise BadRowError("no function", f"the tests use {', '.join(sorted(used))}, of which 'code' defines none"[:120])
    truth = {
        "language": "python",
        "tests": tests,
        "entry_point": list(dict.fromkeys(functions)),
        "classes": list(dict.fromkeys(classes)),
        "setup": setup,
    }
    text = _WRITE.format(prompt=prompt.strip(), tests="\n".join(tests))
    return Task(text, truth, row=row.where, metadata=row.values)


def _text(row: Row, name: str) -> str:
    value = row.column(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError("not a text", f"{name}={value!r}"[:120])
    return value
