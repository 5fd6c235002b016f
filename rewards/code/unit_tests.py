"""Python unit tests that a solution cannot reach.

Two boxes and a socket between them: in one the solution, in the other the tests, which call it as if it were there
(`boxed.tests`). What crosses is plain data (`boxed.wire`), so whatever the solution does to its own process (patching
`assert`, exiting, an `__eq__` that always agrees, searching memory and files) it neither meets an expected value nor
speaks for the tests. Only their process tells the outcome, and a solution that is gone before it does has crashed.

The tests themselves may still allow too much: `assert f(x)` accepts anything true, and a solution that empties a list
which its test sorts and compares with afterwards has changed the question. The solution sees the arguments that a test
passes to a method of the solution's own object, so `truth.classes` must allow such calls. No test can compare or add
such objects (except those of a class in the shared setup, which cross as their attributes), catch the solution's own
exceptions but by the name of Python's they derive from, await it, or read its output. Both sides have the standard
library only.
"""

import re
from dataclasses import replace
from pathlib import Path
from socket import socketpair
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from rewards.code.boxed import solution as solution_side
from rewards.code.boxed import tests as tests_side
from rewards.code.boxed.wire import Malformed, Reader, Writer
from rewards.code.outcome import Judged, Outcome
from rewards.code.truth import Truth
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Boxed, Ended, Limits, Ran, finish
from rewards.sandbox.toolchains import INTEGERS, find

_BOXED = Path(tests_side.__file__).parent
_MAIN = "import sys; sys.path.insert(0, {home!r}); from boxed.{side} import {main}; {main}({fd})"
_TESTS_MB = 512
"""MiB the tests' own process may take at least."""
_ENDED = {Ended.TIME: Outcome.TIME_LIMIT, Ended.MEMORY: Outcome.MEMORY_LIMIT}


def judge(sandbox: Sandbox, truth: Truth, source: str, limits: Limits, *, stop: bool) -> Judged:
    """How `source` does in `truth.tests`, within `limits` for all of them together; stop: at the first failure.

    Raises RuntimeError where that is not known: a box broke, or the tests failed without the solution's doing.
    """
    request = Writer(_refuse, [])
    request.put((truth.entry_point, truth.classes, truth.setup, truth.shared_setup, truth.tests, stop))
    source = _whole(truth, source)
    with TemporaryDirectory(prefix="alignyard-") as folder:
        ours, theirs = socketpair()
        with ours, theirs:
            stdin = source.encode("utf-8", "replace")
            solution = _start(sandbox, solution_side, theirs.fileno(), stdin, Path(folder), limits)
            try:
                generous = limits_of_tests(limits)
                tests = _start(sandbox, tests_side, ours.fileno(), bytes(request.data), Path(folder), generous)
            except BaseException:
                solution.kill(Ended.STOPPED)
                finish(solution)
                raise
        ran = finish(tests, solution)
    return _outcome(ran[0], ran[1], len(truth.tests), limits)


def uncarried(sandbox: Sandbox, truth: Truth, limits: Limits) -> str:
    """The first value that the tests pass to a solution or expect of it and that can't cross, as a sentence, or "".

    The tests run with a stand-in for the solution, so values that they reach only with a real one are not found.
    """
    shared = [name for name in truth.shared_names if name not in truth.solution_names]
    request = Writer(_refuse, [])
    request.put((truth.entry_point, truth.classes, shared, truth.setup, truth.tests))
    with TemporaryDirectory(prefix="alignyard-") as folder:
        ours, theirs = socketpair()
        with ours, theirs:
            [ran] = finish(
                _start(sandbox, tests_side, ours.fileno(), bytes(request.data), Path(folder), limits, main="probe")
            )
    try:
        return str(Reader(ran.stdout, _refuse, []).get())
    except (Malformed, ValueError, TypeError):
        return ""  # the tests ended their own process, or met its limits, so nothing is known


def _whole(truth: Truth, source: str) -> str:
    """`source`, behind the prompt where it is only the body of the prompt's last function."""
    stub = truth.last_stub
    first = next((line for line in source.splitlines() if line.strip()), "")
    if stub and first[:1].isspace() and not re.search(rf"^\s*(?:async\s+)?def\s+{stub}\b", source, re.M):
        return f"{truth.setup.rstrip()}\n{source}"
    return source


def limits_of_tests(limits: Limits) -> Limits:
    """What the tests' own process may take: longer than the solution, so that one that never ends meets its limit."""
    return replace(limits, seconds=2 * limits.seconds, memory_mb=max(limits.memory_mb, _TESTS_MB))


def _start(
    sandbox: Sandbox, side: Any, fd: int, stdin: bytes, folder: Path, limits: Limits, *, main: str = "main"
) -> Boxed:
    python = find("python")
    runtime = replace(python.running, paths=(*python.running.paths, _BOXED))
    code = _MAIN.format(home=str(_BOXED.parent), side=side.__name__.rpartition(".")[2], main=main, fd=fd)
    command = [str(python.executable), "-I", "-S", *INTEGERS, "-c", code]
    return sandbox.start(command, folder=folder, limits=limits, runtime=runtime, stdin=stdin, pass_fds=[fd])


def _outcome(tests: Ran, solution: Ran, total: int, limits: Limits) -> Judged:
    if tests.ended in _ENDED:  # by the solution's doing: it keeps them waiting, or feeds them without end
        return Judged(_ENDED[tests.ended], 0, total, f"{limits.seconds:g} s and {limits.memory_mb} MiB for all tests")
    try:
        outcome, passed, counted, detail = Reader(tests.stdout, _refuse, []).get()
    except (Malformed, ValueError, TypeError) as error:
        said = tests.stderr[-500:].decode(errors="replace").strip()
        raise RuntimeError(f"the tests' process gave no verdict: {tests.ended}, {said or 'nothing said'}") from error
    if outcome == "broken":
        raise RuntimeError(f"the tests cannot judge: {detail}")
    if outcome == "lost":
        how = f"exit code {solution.exit_code}" if solution.signal is None else f"signal {solution.signal}"
        detail = f"the solution left before the tests were over: {solution.ended}, {how}"
        return Judged(_ENDED.get(solution.ended, Outcome.CRASH), passed, counted, detail)
    return Judged(Outcome(outcome), passed, counted, detail)


def _refuse(*what: Any) -> NoReturn:
    raise TypeError(f"no plain data: {what!r:.100}")
