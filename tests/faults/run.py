"""Inject every fault into one small run of GRPO, resume it each time, and write the table of docs/faults.md.

`make test-faults` runs all; `make test-faults ONLY="raylet clock"` those whose names contain a word, and the rows of
the others stay as they were. Each start of the run is the resume from the fault before, and at the end its series is
compared with that of an unharmed run to the bit.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.train.checkpoints import saved_states
from tests.faults.cases import FAULTS, IS_ROOT, Fault
from tests.faults.run_folder import Run

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- measured by make test-faults -->", "<!-- end -->"
HEAD = (
    "| fault | the user sees | steps done again | told after, s | next step after, s | series | load |\n"
    "|---|---|---|---|---|---|---|"
)
GOES_ON = "nothing: the run goes on"


@dataclass
class Measured:
    """A row of the table. Seconds are from the injection, or from the command that meets it. rows: those of the series
    to compare with the unharmed run's; None where it has other settings."""

    sees: str
    lost: int | None = None
    told: float | None = None
    resumed: float | None = None
    rows: list[dict[str, float]] | None = None
    load: float = 0.0

    def line(self, name: str) -> str:
        def cell(value: object) -> str:
            text = f"{value:.0f}" if isinstance(value, float) else "" if value is None else str(value)
            return text.replace("|", r"\|").replace("[", r"\[").replace("<", "&lt;")

        series = None if self.rows is None else "equal"
        return f"| {' | '.join(map(cell, [name, self.sees, self.lost, self.told, self.resumed, series, self.load]))} |"


def measure(fault: Fault, run: Run) -> Measured:
    """Inject a fault and resume the run. Raises AssertionError where the run ends in another way."""
    if fault.own is not None:
        run = run.copy_of_sft(f"own-{FAULTS.index(fault)}")
    stands_still = fault.stopped or (fault.code is not None and fault.own is not None)
    try:
        measured = (_measure_stopped if stands_still else _measure_running)(fault, run)
        if fault.own in (None, ()) and run.stage.joinpath("metrics.jsonl").is_file():
            measured.rows = run.rows()
        return measured
    finally:
        if fault.own is not None:
            run.stop()
            if os.path.ismount(run.stage / "checkpoints"):
                subprocess.run(["umount", "-l", str(run.stage / "checkpoints")], check=True)


def _measure_running(fault: Fault, run: Run) -> Measured:
    if not run.is_running:
        _resume(fault, run)
    first = run.step
    run.wait(lambda: run.step > first + 1 and run.step > run.saved_step, "a step to lose")
    began, shown, injected, saved = time.monotonic(), len(run.text), run.step, run.saved_step
    fault.inject(run)
    if fault.code is not None:
        code, told = run.ended(), time.monotonic() - began
        sees = _check(fault, code, run.text[shown:])
        run.leave_nothing()
        lost = run.step - run.saved_step
        return Measured(sees, lost, told, _resume(fault, run))
    told = None
    if fault.says:
        run.wait(lambda: bool(re.search(fault.says, run.text[shown:], re.DOTALL)), fault.says)
        told = time.monotonic() - began
    if fault.undo is not None:
        if not fault.says:
            time.sleep(10.0)
        fault.undo(run)
    lost = injected - saved if fault.restarts else 0
    run.wait(lambda: run.step > injected, "a step after the fault")
    resumed = time.monotonic() - began
    run.wait(lambda: run.step >= injected + 3, "three steps after the fault")
    return Measured(_sentence(run.text[shown:], fault.says) if fault.says else GOES_ON, lost, told, resumed)


def _measure_stopped(fault: Fault, run: Run) -> Measured:
    """Inject into a run that stands still, or has not started, and start it."""
    if fault.own is None:
        if len(saved_states(run.stage)) < 2:
            if not run.is_running:
                _resume(fault, run)
            run.wait(lambda: len(saved_states(run.stage)) >= 2, "two training states")
        run.stop()
    step, newest = run.step, run.saved_step
    fault.inject(run)
    began = time.monotonic()
    run.start(*fault.own or (), environment=fault.environment)
    if fault.code is not None:
        code, told = run.ended(), time.monotonic() - began
        sees = _check(fault, code, run.text)
        if fault.undo is None:
            return Measured(sees, None, told)
        fault.undo(run)
        run.leave_nothing()
        return Measured(sees, max(step, run.step) - run.saved_step, told, _resume(fault, run))
    told = run.wait(lambda: bool(re.search(fault.says, run.text)), fault.says) if fault.says else None
    is_aside = (run.stage / "checkpoints" / f"step-{newest}.damaged").is_dir()
    first = newest - 2 if is_aside else newest + 1  # a training state is written at every third step
    run.wait_for_steps(first)
    sees = _sentence(run.text, fault.says) if fault.says else GOES_ON
    return Measured(sees, step - first + 1, told, time.monotonic() - began)


def _check(fault: Fault, code: int, text: str) -> str:
    assert code == fault.code, f"exit code {code}\n{text[-4000:]}"
    assert re.search(fault.says, text, re.DOTALL), f"not {fault.says!r}\n{text[-4000:]}"
    return f"code {code}: {_sentence(text, fault.says)}"


def _resume(fault: Fault, run: Run) -> float:
    """Give the command again. Returns the seconds until its first new step."""
    began, first = time.monotonic(), run.saved_step + 1
    run.start(*fault.own or (), environment=fault.environment)
    run.wait_for_steps(first)
    return time.monotonic() - began


def _sentence(text: str, pattern: str) -> str:
    """The line of the output in which the pattern begins, without paths, numbers of processes and addresses."""
    found = re.search(pattern, text, re.DOTALL)
    start = text.rfind("\n", 0, found.start() if found else 0) + 1
    line = re.sub(r"'(/[^' ]*)'", lambda found: f"'{Path(found[1]).name}'", text[start:].partition("\n")[0].strip())
    line = re.sub(r"process \d+ on [\d.]+", "process 123 on 10.0.0.1", line.removeprefix("alignyard: "))
    line = re.sub(r" of \S+ \([\d.]+\)", " of node-1 (10.0.0.1)", re.sub(r"(process|CONT) \d+", r"\1 123", line))
    line = re.sub(r"\(raylet\) of \S+", "(raylet) of node-1", line)
    return line if len(line) <= 200 else line[:197] + "..."


def table(page: str, measured: dict[str, Measured]) -> str:
    """The page with the rows of `measured`, and of other faults those that it had."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines() if line.startswith("| ")}
    lines |= {name: row.line(name) for name, row in measured.items()}
    body = "\n".join(lines[fault.name] for fault in FAULTS if fault.name in lines)
    return f"{before}{BEGIN}\n\n{HEAD}\n{body}\n\n{END}{after}"


def inject_all(chosen: Sequence[Fault], run: Run, measured: dict[str, Measured]) -> list[str]:
    """Inject faults one after the other, and add their rows to `measured`. Returns the names of those that the run did
    not meet as it has to."""
    failed: list[str] = []
    for fault in chosen:
        if fault.needs_root and not IS_ROOT:
            print(f"{fault.name}: skipped, it needs root", flush=True)
            continue
        print(f"{fault.name}, load {os.getloadavg()[0]:.1f}", flush=True)
        if run.saved_step == 0:
            run.start()
            run.wait(lambda: run.saved_step >= 3, "the first training state")
        if fault.own is not None:
            run.stop()
        try:
            measured[fault.name] = measure(fault, run)
            measured[fault.name].load = os.getloadavg()[0]
            print(f"  {measured[fault.name].line(fault.name)}", flush=True)
        except (AssertionError, OSError, subprocess.SubprocessError, psutil.Error) as error:
            failed.append(fault.name)
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            if fault.undo is not None and fault.own is None:
                with suppress(OSError, subprocess.SubprocessError):
                    fault.undo(run)
            run.stop()
    run.stop()
    return failed


def compare(measured: dict[str, Measured], reference: Run) -> list[str]:
    """Compare the series of each row with the unharmed run's. Returns the names of those that differ."""
    longest = max((len(row.rows) for row in measured.values() if row.rows), default=0)
    if reference.step < longest:
        reference.start()
        reference.wait(lambda: reference.step >= longest, "the unharmed run")
        reference.stop()
    expected, other = reference.rows() if longest else [], list[str]()
    for name, row in measured.items():
        if row.rows is not None and row.rows != expected[: len(row.rows)]:
            first = next(i for i, pair in enumerate(zip(row.rows, expected, strict=False)) if pair[0] != pair[1])
            print(f"{name} FAILED: another series from row {first + 1} on", flush=True)
            other.append(name)
    return other


def main(folder: Path, words: Sequence[str], page: Path = PAGE) -> int:
    """Inject the faults whose names contain one of `words`, or all, and write their rows into `page`."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    measured: dict[str, Measured] = {}
    failed = inject_all(chosen, Run(folder / "harmed"), measured)
    failed += compare(measured, Run(folder / "unharmed"))
    good = {name: row for name, row in measured.items() if name not in failed}
    page.write_text(table(page.read_text(), good))
    print(f"{len(good)} of {len(chosen)} faults as expected; failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
