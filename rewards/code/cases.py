"""Judge a program by its output.

The program is compiled once and runs each case in a box of its own; the expected output never enters a box.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from rewards.code.outcome import CodeOutcome, CodeResult, clip
from rewards.code.truth import Case, Checker, Truth
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import ExitReason, Limits, RunResult
from rewards.sandbox.toolchains import COMPILE, find_toolchain, plan_program

CHECKING = Limits(seconds=10.0, memory_mb=512, output_kb=64)
"""Limits of a checker for one case."""

_OUTCOMES = {
    ExitReason.TIME: CodeOutcome.TIME_LIMIT,
    ExitReason.MEMORY: CodeOutcome.MEMORY_LIMIT,
    ExitReason.OUTPUT: CodeOutcome.OUTPUT_LIMIT,
}
_NUMBER = re.compile(rb"(?<![\w.])([+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?)(?![\w.]*\w|\.)")
_DECIMALS = 6
"""Numbers with this many decimals may be rounded either way in the last one."""
_EXACT = Context(prec=2500)
"""Precise enough to subtract any two numbers that _NUMBER matches without rounding."""

_ACCEPTED, _REJECTED, _DATA_ERROR, _OTHER_ERROR = 0, (1, 2), 86, 87
"""Exit codes of a checker. The last two are the wrapper's; any other is a checker's own word that it failed."""
_PYTHON_CHECKER = """\
import os, sys, traceback
reads = []
def audit(event, arguments):
    if event == "open" and os.path.basename(str(arguments[0])) == "output":
        reads.append(event)
def fault(kind, error, trace):
    data = (AssertionError, ValueError, LookupError, ArithmeticError, EOFError, StopIteration, RecursionError)
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit({data_error} if reads and issubclass(kind, data) else {other_error})
sys.addaudithook(audit)
sys.excepthook = fault
exec(compile({source!r}, "checker.py", "exec"))
"""
"""Wrapper of a checker in Python, which an uncaught exception would end with 1, a rejection. _DATA_ERROR: an exception
that wrong data cause, raised after the output was opened."""


class CompileError(Exception):
    """The source does not compile; the message is the compiler's."""


class Executable:
    """A program in its folder. An interpreted one is checked only when a run fails, which saves a box.

    The constructor, `compile` and `run` raise CompileError if the source does not compile, and RuntimeError if a box
    breaks. compiling: limits of the compiler.
    """

    def __init__(
        self, sandbox: Sandbox, language: str, source: str, folder: Path, *, memory_mb: int, compiling: Limits
    ) -> None:
        self.folder = folder
        self._compiling = compiling
        self._sandbox = sandbox
        self._toolchain = find_toolchain(language)
        self._program = plan_program(language, source, memory_mb)
        self._compiled = False
        (folder / self._program.file).write_bytes(source.encode("utf-8", "replace"))
        if not self._program.interpreted:
            self.compile()

    def compile(self) -> None:
        """Compile the program, or check it if it is interpreted; at most once."""
        if self._compiled:
            return
        self._compiled = True
        runtime, command = self._toolchain.compiling, self._program.compile
        result = self._sandbox.run(command, folder=self.folder, limits=self._compiling, runtime=runtime, writable=True)
        if result.reason is not ExitReason.EXITED or result.exit_code != 0:
            message = clip((result.stderr or result.stdout).decode(errors="replace"), 500)
            how = _how_it_failed(result, self._compiling)
            raise CompileError(message if result.reason is ExitReason.EXITED else f"the compiler: {how}: {message}")

    def run(self, limits: Limits, *, stdin: bytes = b"", arguments: Sequence[str] = ()) -> RunResult:
        """Run the program once."""
        runtime, command = self._toolchain.running, [*self._program.run, *arguments]
        result = self._sandbox.run(command, folder=self.folder, limits=limits, runtime=runtime, stdin=stdin)
        if result.reason is ExitReason.EXITED and result.exit_code != 0:
            self.compile()
        return result


def judge_cases(
    sandbox: Sandbox, truth: Truth, source: str, limits: Limits, compiling: Limits, *, stop: bool
) -> CodeResult:
    """Compile `source` within `compiling` and run it on `truth.cases`, each within `limits`.

    stop: at the first failure. A checker that raises, crashes or meets a limit is tried on the case's answer. If it
    accepts or rejects that, the output is at fault, and wrong. If the case has no answer, the output is at fault for an
    exception in Python that wrong data cause, raised after the output was opened.

    Raises RuntimeError if there is no result: a box broke, or the checker itself failed.
    """
    total = len(truth.cases) or 1
    with TemporaryDirectory(prefix="alignyard-") as folder:
        try:
            program = Executable(
                sandbox, truth.language, source, Path(folder), memory_mb=limits.memory_mb, compiling=compiling
            )
            if truth.compile_only:
                program.compile()
                return CodeResult(CodeOutcome.PASSED, 1, 1)
            passed, outcome, detail = 0, CodeOutcome.PASSED, ""
            for number, case in enumerate(truth.cases, 1):
                failure = _run_case(sandbox, truth.checker, program, case, limits)
                passed += failure is None
                if failure and outcome is CodeOutcome.PASSED:
                    outcome, detail = failure[0], f"case {number} of {total}: {failure[1]}"
                if failure and stop:
                    break
            return CodeResult(outcome, passed, total, detail)
        except CompileError as error:
            return CodeResult(CodeOutcome.COMPILE_ERROR, 0, total, str(error))


def same_output(expected: bytes, actual: bytes) -> bool:
    """Compare two outputs line by line, ignoring blanks at line ends and blank lines at the end.

    Two integers are compared as text. A number with a decimal point or an exponent equals an integer of the same value.
    Two such numbers are equal within 1e-9 of the expected one, a rounding error. If both have six or more decimals,
    they are also equal within one unit in the last decimal that both have. If one has fewer, they must besides differ
    by less than half a unit in its last decimal.

    Example:
        same_output(b"0.333333 a", b"0.333334 a\\n")  # True
    """
    expected_lines, actual_lines = _lines(expected), _lines(actual)
    return len(expected_lines) == len(actual_lines) and all(map(_same_line, expected_lines, actual_lines))


def _same_line(expected: bytes, actual: bytes) -> bool:
    if expected == actual:
        return True
    a, b = _NUMBER.split(expected), _NUMBER.split(actual)  # text at even places, numbers at odd ones
    if len(a) != len(b) or a[::2] != b[::2]:
        return False
    return all(x == y or _same_number(x, y) for x, y in zip(a[1::2], b[1::2], strict=True))


def _same_number(expected: bytes, actual: bytes) -> bool:
    a, b = _EXACT.create_decimal(expected.decode()), _EXACT.create_decimal(actual.decode())
    integers = [number.lstrip(b"+-").isdigit() for number in (expected, actual)]
    if any(integers):
        return not all(integers) and a == b
    gap = abs(_EXACT.subtract(a, b))
    exponent = max(int(a.as_tuple().exponent), int(b.as_tuple().exponent))
    unit = Decimal((0, (1,), exponent))
    if exponent <= -_DECIMALS and gap <= unit:
        return True
    rounding = max(abs(a) * Decimal("1e-9"), Decimal("1e-12"))
    return gap <= rounding and (exponent <= -_DECIMALS or 2 * gap < unit)


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


def _run_case(
    sandbox: Sandbox, checker: Checker | None, program: Executable, case: Case, limits: Limits
) -> tuple[CodeOutcome, str] | None:
    """Return how one case fails, or None if it passes."""
    stdin, expected = case.stdin.encode("utf-8", "replace"), (case.stdout or "").encode("utf-8", "replace")
    result = program.run(replace(limits, output_kb=limits.output_kb + len(expected) // 512), stdin=stdin)
    if result.reason is not ExitReason.EXITED or result.exit_code != 0:
        message = clip(result.stderr[-2000:].decode(errors="replace").strip().rpartition("\n")[2])
        how = _how_it_failed(result, limits)
        return _OUTCOMES.get(result.reason, CodeOutcome.CRASH), f"{how}: {message}" if message else how
    if checker:
        answer = None if case.stdout is None else expected
        reason = _rejection(sandbox, checker, stdin, result.stdout, answer)
        return None if reason is None else (CodeOutcome.WRONG_ANSWER, f"the checker says {reason!r}")
    if same_output(expected, result.stdout):
        return None
    return CodeOutcome.WRONG_ANSWER, _difference(expected, result.stdout)


def _how_it_failed(result: RunResult, limits: Limits) -> str:
    match result.reason:
        case ExitReason.EXITED:
            return f"exit code {result.exit_code}"
        case ExitReason.TIME:
            bound = f"{limits.seconds:g} s"
        case ExitReason.MEMORY:
            bound = f"{limits.memory_mb} MiB"
        case ExitReason.OUTPUT:
            bound = f"{limits.output_kb} KiB"
        case _:
            bound = f"signal {result.signal}"
    return f"{result.reason} ({bound})"


def _difference(expected: bytes, actual: bytes) -> str:
    """Describe the first line in which two outputs differ."""
    pairs = zip_longest(_lines(expected), _lines(actual))
    number, pair = next((n, pair) for n, pair in enumerate(pairs, 1) if None in pair or not _same_line(*pair))
    a, b = ("the end" if text is None else repr(clip(text.decode(errors="replace"))) for text in pair)
    return f"line {number}: expected {a}, got {b}"


@dataclass(frozen=True, slots=True)
class _CompiledChecker:
    """A checker's program. lock: held while it judges. folder: deleted with this record."""

    program: Executable
    folder: "TemporaryDirectory[str]"
    lock: Lock = field(default_factory=Lock)


def _rejection(sandbox: Sandbox, checker: Checker, stdin: bytes, output: bytes, answer: bytes | None) -> str | None:
    """Return why the checker rejects an output, or None. Raises RuntimeError if the checker itself failed; see
    `judge_cases`."""
    result = _run_checker(sandbox, checker, stdin, output, answer or b"")
    if _judges(result):
        return None if result.exit_code == _ACCEPTED else clip(_message(result))
    fault = f"{_how_it_failed(result, CHECKING)}: {clip(_message(result)[-200:])}"
    data_error = result.exit_code == _DATA_ERROR
    if result.exit_code not in (None, _DATA_ERROR, _OTHER_ERROR) or (answer is None and not data_error):
        raise RuntimeError(f"the checker failed: {fault}")
    if answer is not None:
        on_answer = _fault_on_answer(sandbox, checker.language, checker.source, stdin, answer)
        if on_answer:
            raise RuntimeError(f"the checker failed, on the answer of the case too: {on_answer}")
    return f"it failed on this output: {fault}"


@lru_cache(maxsize=64)
def _fault_on_answer(sandbox: Sandbox, language: str, source: str, stdin: bytes, answer: bytes) -> str:
    """Return how the checker fails on a case's answer, or "" if it accepts or rejects it."""
    result = _run_checker(sandbox, Checker(language=language, source=source), stdin, answer, answer)
    return "" if _judges(result) else f"{_how_it_failed(result, CHECKING)}: {clip(_message(result)[-200:])}"


def _run_checker(sandbox: Sandbox, checker: Checker, stdin: bytes, output: bytes, answer: bytes) -> RunResult:
    compiled = _compiled_checker(sandbox, checker.language, checker.source)
    files = {"input": stdin, "output": output, "answer": answer}
    with compiled.lock:
        for name, content in files.items():
            (compiled.program.folder / name).write_bytes(content)
        return compiled.program.run(CHECKING, arguments=list(files))


def _judges(result: RunResult) -> bool:
    """Return whether a checker accepted or rejected the output."""
    return result.reason is ExitReason.EXITED and result.exit_code in (_ACCEPTED, *_REJECTED)


def _message(result: RunResult) -> str:
    return (result.stderr or result.stdout).decode(errors="replace")


@lru_cache(maxsize=16)
def _compiled_checker(sandbox: Sandbox, language: str, source: str) -> _CompiledChecker:
    folder = TemporaryDirectory(prefix="alignyard-")
    if language == "python":
        source = _PYTHON_CHECKER.format(source=source, data_error=_DATA_ERROR, other_error=_OTHER_ERROR)
    limits = {"memory_mb": CHECKING.memory_mb, "compiling": COMPILE}
    try:
        program = Executable(sandbox, language, source, Path(folder.name), **limits)
        program.compile()  # now, so that its fault is not taken for the judged program's
    except CompileError as error:
        raise RuntimeError(f"the checker does not compile: {error}") from error
    return _CompiledChecker(program, folder)
