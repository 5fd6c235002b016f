"""Judge a program by Python unit tests that it cannot reach.

The solution runs in one box and the tests in another, joined by a socket; the tests call the solution as if it were in
their process (`boxed.tests`). Only plain data crosses (`boxed.wire`). So a solution may patch `assert`, exit, return
objects whose `__eq__` always agrees, or search memory and files: it meets no expected value and cannot answer for the
tests. The tests' process alone reports the outcome, and a solution that exits earlier has crashed.

Weak tests stay weak: `assert f(x)` accepts any true value, and a solution that empties a list in place passes a test
that compares with the sorted list afterwards. Arguments to a method of the solution's own object are visible to the
solution, so `truth.classes` must allow such calls. A test cannot compare or add the solution's own objects (except
those of a class in the shared setup, which cross as their attributes), catch its exceptions other than by the Python
exception they derive from, await it, or read its output. Both sides have the standard library only.
"""

import os
import re
import shutil
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from socket import socket, socketpair
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from rewards.code.boxed import wire
from rewards.code.boxed.wire import Malformed, Reader, Writer
from rewards.code.outcome import CodeOutcome, CodeResult
from rewards.code.truth import Truth
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Box, ExitReason, Limits, RunResult, finish
from rewards.sandbox.toolchains import INTEGERS, find_toolchain

_MAIN = "import sys; sys.path.insert(0, {home!r}); from boxed.{side} import {main}; {main}({fd})"
_TESTS_MB = 512
"""Least memory of the tests' process, in MiB."""
_OUTCOMES = {ExitReason.TIME: CodeOutcome.TIME_LIMIT, ExitReason.MEMORY: CodeOutcome.MEMORY_LIMIT}


def judge_tests(sandbox: Sandbox, truth: Truth, source: str, limits: Limits, *, stop: bool) -> CodeResult:
    """Run `truth.tests` on `source`, within `limits` for all of them together; stop: at the first failure.

    Raises RuntimeError if there is no result: a box broke, or the tests failed by themselves.
    """
    request = (truth.entry_point, truth.classes, truth.setup, truth.shared_setup, truth.tests, stop)
    stdin = _with_prompt(truth, source).encode("utf-8", "replace")
    with TemporaryDirectory(prefix="alignyard-") as name, ExitStack() as boxes:
        folder = Path(name)
        tests_end, solution_end = socketpair()
        with tests_end, solution_end:  # closed once the boxes have them, or neither would notice the other's end
            solution = boxes.enter_context(
                _start(sandbox, "solution", "serve_solution", solution_end, stdin, folder, limits)
            )
            tests_limits = limits_of_tests(limits)
            tests = boxes.enter_context(
                _start(sandbox, "tests", "report_tests", tests_end, _packed(request), folder, tests_limits)
            )
        ran_tests, ran_solution = finish(tests, solution)
    return _result(ran_tests, ran_solution, len(truth.tests), limits)


def untransferable(sandbox: Sandbox, truth: Truth, limits: Limits) -> str:
    """Return a sentence on the first value that the tests pass or expect and that cannot cross, or "".

    The tests run against a stand-in for the solution, so values that need a real one are not found.
    """
    shared = [name for name in truth.shared_names if name not in truth.solution_names]
    request = (truth.entry_point, truth.classes, shared, truth.setup, truth.tests)
    with TemporaryDirectory(prefix="alignyard-") as folder, ExitStack() as boxes:
        tests_end, solution_end = socketpair()
        with tests_end, solution_end:
            probe = boxes.enter_context(
                _start(sandbox, "tests", "report_probe", tests_end, _packed(request), Path(folder), limits)
            )
        [result] = finish(probe)
    try:
        return str(Reader(result.stdout, _refuse, []).get())
    except (Malformed, ValueError, TypeError):
        return ""  # the tests ended their own process, or met its limits


def limits_of_tests(limits: Limits) -> Limits:
    """Return the limits of the tests' process, above the solution's: an endless solution meets its own first."""
    return replace(limits, seconds=2 * limits.seconds, memory_mb=max(limits.memory_mb, _TESTS_MB))


def _with_prompt(truth: Truth, source: str) -> str:
    """Return `source`, behind the prompt if it is only the body of the prompt's last function."""
    stub = truth.last_stub
    first = next((line for line in source.splitlines() if line.strip()), "")
    if stub and first[:1].isspace() and not re.search(rf"^\s*(?:async\s+)?def\s+{stub}\b", source, re.M):
        return f"{truth.setup.rstrip()}\n{source}"
    return source


def _start(
    sandbox: Sandbox, side: str, main: str, end: socket, stdin: bytes, folder: Path, limits: Limits
) -> AbstractContextManager[Box]:
    """Start `main` of the module boxed.`side` in a box, with one end of the socket."""
    python = find_toolchain("python")
    package = _boxed_package()
    runtime = replace(python.running, paths=(*python.running.paths, package))
    code = _MAIN.format(home=str(package.parent), side=side, main=main, fd=end.fileno())
    command = [str(python.executable), "-I", "-S", *INTEGERS, "-c", code]
    return sandbox.start(command, folder=folder, limits=limits, runtime=runtime, stdin=stdin, pass_fds=[end.fileno()])


@cache
def _copies() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="alignyard-")


@cache
def _boxed_package() -> Path:
    """The folder of the package `boxed`; a copy where root alone may read it, since programs in a box are not root."""
    package = Path(wire.__file__).parent
    if os.geteuid() != 0 or all(path.stat().st_mode & 0o004 for path in (package, *package.glob("*.py"))):
        return package
    copy = Path(_copies().name) / "boxed"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy.parent, copy, *copy.iterdir()):
        path.chmod(0o755)
    return copy


def _packed(request: tuple[Any, ...]) -> bytes:
    writer = Writer(_refuse, [])
    writer.put(request)
    return bytes(writer.data)


def _result(tests: RunResult, solution: RunResult, total: int, limits: Limits) -> CodeResult:
    if tests.reason in _OUTCOMES:  # the solution's fault: it keeps the tests waiting, or feeds them without end
        detail = f"{limits.seconds:g} s and {limits.memory_mb} MiB for all tests"
        return CodeResult(_OUTCOMES[tests.reason], 0, total, detail)
    try:
        outcome, passed, counted, detail = Reader(tests.stdout, _refuse, []).get()
    except (Malformed, ValueError, TypeError) as error:
        message = tests.stderr[-500:].decode(errors="replace").strip() or "no message"
        raise RuntimeError(f"the tests' process gave no verdict: {tests.reason}, {message}") from error
    if outcome == "broken":
        raise RuntimeError(f"the tests cannot judge: {detail}")
    if outcome == "lost":
        how = f"exit code {solution.exit_code}" if solution.signal is None else f"signal {solution.signal}"
        detail = f"the solution ended before the tests were over: {solution.reason}, {how}"
        return CodeResult(_OUTCOMES.get(solution.reason, CodeOutcome.CRASH), passed, counted, detail)
    return CodeResult(CodeOutcome(outcome), passed, counted, detail)


def _refuse(*value: Any) -> NoReturn:
    raise TypeError(f"no plain data: {value!r:.100}")
