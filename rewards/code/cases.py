"""Programs that compile, and what they print.

A program is compiled once and runs each case in a box of its own, in which the expected output never is.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Context, Decimal
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

from rewards.code.outcome import Judged, Outcome, clip
from rewards.code.truth import Case, Checker, Truth
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Ended, Limits, Ran
from rewards.sandbox.toolchains import COMPILE, find

CHECKING = Limits(seconds=10.0, memory_mb=512, output_kb=64)
"""What a checker may take for one case."""
ENDED = {
    Ended.TIME: Outcome.TIME_LIMIT,
    Ended.MEMORY: Outcome.MEMORY_LIMIT,
    Ended.OUTPUT: Outcome.OUTPUT_LIMIT,
}

_NUMBER = re.compile(rb"(?<![\w.])([+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?)(?![\w.]*\w|\.)")
_DECIMALS = 6
"""Fewest decimals of a number whose last one may be rounded either way."""
_EXACT = Context(prec=2500)
"""Has digits enough to subtract any two numbers that _NUMBER finds exactly."""

_ACCEPTED, _REJECTED = 0, (1, 2)
_PYTHON_CHECKER = """\
import os, sys, traceback
def fault(*error):
    traceback.print_exception(*error)
    os._exit(3)
sys.excepthook = fault
exec(compile({source!r}, "checker.py", "exec"))
"""
"""A checker in Python, where an exception that nobody catches would end it with 1, as if it rejected."""


class CompileError(Exception):
    """The source is no program; the message is the compiler's."""


class Executable:
    """A program in its folder. Where the language is interpreted it is checked only when it fails, which saves a box.

    Made, compiled or run, it raises CompileError where the source is no program, and RuntimeError where a box breaks.
    """

    def __init__(self, sandbox: Sandbox, language: str, source: str, folder: Path, *, memory_mb: int) -> None:
        self.folder = folder
        self._sandbox = sandbox
        self._toolchain = find(language)
        self._program = self._toolchain.plan(source, memory_mb)
        self._compiled = False
        (folder / self._program.file).write_bytes(source.encode("utf-8", "replace"))
        if not self._program.interpreted:
            self.compile()

    def compile(self) -> None:
        """Compile it, or check it where nothing is to be made; once."""
        if self._compiled:
            return
        self._compiled = True
        ran = self._sandbox.run(
            self._program.compile,
            folder=self.folder,
            limits=COMPILE,
            runtime=self._toolchain.compiling,
            writable=True,
        )
        if ran.ended is not Ended.EXITED or ran.exit_code != 0:
            said = clip((ran.stderr or ran.stdout).decode(errors="replace"), 500)
            raise CompileError(said if ran.ended is Ended.EXITED else f"the compiler ended by {ran.ended}: {said}")

    def run(self, limits: Limits, *, stdin: bytes = b"", arguments: Sequence[str] = ()) -> Ran:
        """How it runs once."""
        command = [*self._program.run, *arguments]
        ran = self._sandbox.run(
            command, folder=self.folder, limits=limits, runtime=self._toolchain.running, stdin=stdin
        )
        if ran.ended is Ended.EXITED and ran.exit_code != 0:
            self.compile()
        return ran


def judge(sandbox: Sandbox, truth: Truth, source: str, limits: Limits, *, stop: bool) -> Judged:
    """How the program `source` compiles and does in `truth.cases`, each within `limits`; stop: at the first failure.

    Raises RuntimeError where that is not known: a box broke, or the checker failed.
    """
    total = len(truth.cases) or 1
    with TemporaryDirectory(prefix="alignyard-") as folder:
        try:
            program = Executable(sandbox, truth.language, source, Path(folder), memory_mb=limits.memory_mb)
            if truth.compile_only:
                program.compile()
                return Judged(Outcome.PASSED, 1, 1)
            return _run_cases(sandbox, truth, program, limits, stop=stop)
        except CompileError as error:
            return Judged(Outcome.COMPILE_ERROR, 0, total, str(error))


def _run_cases(sandbox: Sandbox, truth: Truth, program: Executable, limits: Limits, *, stop: bool) -> Judged:
    passed, first, total = 0, None, len(truth.cases)
    for number, case in enumerate(truth.cases, 1):
        fault = _run_case(sandbox, truth.checker, program, case, limits)
        passed += fault is None
        if fault and not first:
            first = fault[0], f"case {number} of {total}: {fault[1]}"
        if first and stop:
            break
    return Judged(first[0] if first else Outcome.PASSED, passed, total, first[1] if first else "")


def same_output(expected: bytes, got: bytes) -> bool:
    """Compare two outputs line by line, except for blanks at the end of a line and blank lines at the end of all.

    Two integers are compared as text. A number with a decimal point or an exponent agrees with an integer that is equal
    to it. Two such numbers agree within 1e-9 of the expected one, a rounding error. Where both have six or more
    decimals, they also agree within one unit in the last decimal that both have. Where one has fewer, they must besides
    differ by less than half a unit in its last decimal.
    """
    wanted, found = _lines(expected), _lines(got)
    return len(wanted) == len(found) and all(map(_same_line, wanted, found))


def _same_line(expected: bytes, got: bytes) -> bool:
    if expected == got:
        return True
    wanted, found = _NUMBER.split(expected), _NUMBER.split(got)
    if len(wanted) != len(found) or wanted[::2] != found[::2]:
        return False
    return all(a == b or _same_number(a, b) for a, b in zip(wanted[1::2], found[1::2], strict=True))


def _same_number(expected: bytes, got: bytes) -> bool:
    a, b = _EXACT.create_decimal(expected.decode()), _EXACT.create_decimal(got.decode())
    integers = [number.lstrip(b"+-").isdigit() for number in (expected, got)]
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
) -> tuple[Outcome, str] | None:
    """What goes wrong in one run, or None."""
    stdin, expected = case.stdin.encode("utf-8", "replace"), (case.stdout or "").encode("utf-8", "replace")
    ran = program.run(replace(limits, output_kb=limits.output_kb + len(expected) // 512), stdin=stdin)
    if ran.ended is not Ended.EXITED or ran.exit_code != 0:
        how = f"exit code {ran.exit_code}" if ran.ended is Ended.EXITED else f"{ran.ended} ({_limit(ran, limits)})"
        said = clip(ran.stderr[-2000:].decode(errors="replace").strip().rpartition("\n")[2])
        return ENDED.get(ran.ended, Outcome.CRASH), f"{how}: {said}" if said else how
    if checker:
        reason = _rejected(sandbox, checker, {"input": stdin, "output": ran.stdout, "answer": expected})
        return None if reason is None else (Outcome.WRONG_ANSWER, f"the checker says {reason!r}")
    return None if same_output(expected, ran.stdout) else (Outcome.WRONG_ANSWER, _difference(expected, ran.stdout))


def _limit(ran: Ran, limits: Limits) -> str:
    match ran.ended:
        case Ended.TIME:
            return f"{limits.seconds:g} s"
        case Ended.MEMORY:
            return f"{limits.memory_mb} MiB"
        case Ended.OUTPUT:
            return f"{limits.output_kb} KiB"
        case _:
            return f"signal {ran.signal}"


def _difference(expected: bytes, got: bytes) -> str:
    """The first line in which two outputs differ."""
    pairs = zip_longest(_lines(expected), _lines(got))
    line, (wanted, found) = next(
        (number, pair) for number, pair in enumerate(pairs, 1) if None in pair or not _same_line(*pair)
    )
    wanted, found = (
        "the end" if text is None else repr(clip(text.decode(errors="replace"))) for text in (wanted, found)
    )
    return f"line {line}: expected {wanted}, got {found}"


def _rejected(sandbox: Sandbox, checker: Checker, files: dict[str, bytes]) -> str | None:
    """Why the checker rejects an output, or None. Raises RuntimeError where it neither accepts nor rejects."""
    program, lock, _ = _checker(sandbox, checker.language, checker.source)
    with lock:
        for name, content in files.items():
            (program.folder / name).write_bytes(content)
        ran = program.run(CHECKING, arguments=list(files))
    said = (ran.stderr or ran.stdout).decode(errors="replace")
    if ran.ended is not Ended.EXITED or ran.exit_code not in (_ACCEPTED, *_REJECTED):
        raise RuntimeError(f"the checker failed: {ran.ended}, exit code {ran.exit_code}: {clip(said[-200:])}")
    return None if ran.exit_code == _ACCEPTED else clip(said)


@lru_cache(maxsize=16)
def _checker(sandbox: Sandbox, language: str, source: str) -> tuple[Executable, Lock, "TemporaryDirectory[str]"]:
    """The compiled checker, what must be held while it judges, and its folder, which lasts as long as it is
    remembered."""
    folder = TemporaryDirectory(prefix="alignyard-")
    source = _PYTHON_CHECKER.format(source=source) if language == "python" else source
    try:
        program = Executable(sandbox, language, source, Path(folder.name), memory_mb=CHECKING.memory_mb)
        program.compile()  # now, or its fault would be taken for the judged program's
        return program, Lock(), folder
    except CompileError as error:
        raise RuntimeError(f"the checker does not compile: {error}") from error
