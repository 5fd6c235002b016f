"""Rows of HumanEval, MBPP and CRUXEval as tasks of their rewards; `rewards.code.truth` documents their truth."""

import ast
from collections.abc import Callable

from configs.program_suites import CruxEvalSuite, HumanEvalSuite, LiveCodeBenchSuite, MBPPSuite
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.livecodebench import contest_task
from pipeline.evaluation.shots import read_shots, with_shots
from rewards.types import Task

_COMPLETE = (
    "Complete this Python function. Answer with the whole function, and whatever it needs, in one block of code.\n\n"
    "```python\n{prompt}\n```"
)
_WRITE = "{prompt}\n\nWrite it in Python, in one block of code, so that these tests pass:\n\n```python\n{tests}\n```"


_FUNCTION = "Here is a Python function.\n\n```python\n{code}\n```\n\n{question}\n\n{form}"
_ASKED = {
    "output": "What does `f({input})` return?",
    "input": "Find arguments for which `f` returns `{output}`. There may be several solutions; give one.",
}
_FORMS = {"output": "f({input}) == ...", "input": "f(...) == {output}"}


def program_task(
    suite: HumanEvalSuite | MBPPSuite | LiveCodeBenchSuite | CruxEvalSuite,
) -> Callable[[Row], Task | None]:
    """Return a function from a row to its task, or to None for a row outside of the suite's window.

    It raises BadRowError for a row without a needed column. Raises ValueError for a bad example.
    """
    match suite:
        case HumanEvalSuite():
            return _human_eval
        case LiveCodeBenchSuite():
            return contest_task(suite)
        case MBPPSuite():
            solved = read_shots(suite, lambda row: (_mbpp(row).prompt, f"```python\n{_code(row)}\n```"))
            return lambda row: with_shots(_mbpp(row), solved)
        case CruxEvalSuite():
            predicted = read_shots(suite, lambda row: (_crux_eval(suite, row).prompt, _crux_answer(suite, row)))
            return lambda row: with_shots(_crux_eval(suite, row), predicted)


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


def _crux_eval(suite: CruxEvalSuite, row: Row) -> Task:
    truth = {name: _text(row, name) for name in ("code", "output")} | {"predicts": suite.predicts}
    truth["input"] = str(row.column("input"))  # f may have no arguments
    form = f"[ANSWER]{_FORMS[suite.predicts]}[/ANSWER]".format(**truth)
    ask = "Reason step by step, then end" if suite.reasons else "Answer only"
    question, form = _ASKED[suite.predicts].format(**truth), f"{ask} with the completed line, in plain values: {form}"
    return Task(_FUNCTION.format(code=truth["code"].strip(), question=question, form=form), truth, row=row.where)


def _crux_answer(suite: CruxEvalSuite, row: Row) -> str:
    line = f"[ANSWER]f({row.column('input')}) == {row.column('output')}[/ANSWER]"
    return f"{_text(row, 'thought')}\n\n{line}" if suite.reasons else line


def _code(row: Row) -> str:
    return _text(row, "code").replace("\r\n", "\n").strip()


def _text(row: Row, name: str) -> str:
    value = row.column(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError("not a text", f"{name}={value!r}"[:120])
    return value
