"""`alignyard watch`: a run seen live, in a terminal and as lines, until it ends."""

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from jobs.cli import main
from jobs.verbs import watch
from pipeline.disk.run_record import RunRecord, State
from tests.jobs.recorded_runs import RUNNING, GoingOn, record_steps, recorded_run
from tests.waiting import wait_until


def console(*, terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width, height=40, legacy_windows=False), file


@pytest.mark.parametrize("terminal", ["xterm", "dumb", ""])
def test_a_run_is_watched_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: str) -> None:
    monkeypatch.setenv("TERM", terminal or "xterm")
    folder = recorded_run(tmp_path / "small", steps=3, state=RUNNING)
    out, printed = console(terminal=bool(terminal))
    monkeypatch.setattr(watch, "OUT", out)
    monkeypatch.setattr(watch, "_SECONDS", 0.05)
    going_on = GoingOn(folder)

    def go_on() -> None:
        wait_until(lambda: "step 3" in printed.getvalue() or "3/20" in printed.getvalue())
        record_steps(folder / "grpo", 4, 5)
        with (folder / "grpo" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "rewa')  # being written
        going_on.end("stopped itself")

    with going_on:
        thread = threading.Thread(target=go_on)
        thread.start()
        code = main(["watch", "small", "--runs-dir", str(tmp_path)])
        thread.join()
    text = printed.getvalue()
    assert code == 0 and text.endswith("small: stopped itself\n")
    assert ("\x1b[" in text) == (terminal == "xterm"), "a terminal without a cursor gets plain lines"
    assert ("5/20" in text) and ("\x1b]0" not in text) and ("\x1b[2J\x1b]" not in text)
    if terminal == "xterm":
        assert "▁" in text and "samples of step 5" in text and "sft done" in text
    else:
        assert [line for line in text.splitlines() if line.startswith(("sft", "grpo"))] == [
            "sft: done", "grpo: running", "grpo: stopped itself",
        ]  # fmt: skip
        assert [f"{step}/20" in text for step in range(1, 7)] == [True] * 5 + [False]
        assert max(map(len, text.splitlines())) <= 80


def test_nothing_is_cut_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorded_run(tmp_path / "small", steps=20, state=RUNNING)
    out, printed = console(terminal=False)
    monkeypatch.setattr(watch, "OUT", out)
    for line in watch._view(RunRecord.read(folder)):
        out.print(line, soft_wrap=True)
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and all(line.isprintable() for line in lines)
    curve = next(line for line in lines if line.startswith("  reward "))
    assert curve.split()[1][0] == "▁" and curve.split()[1][-1] == "█" and curve.endswith("0.02 -> 0.4")
    assert any(line.startswith("  seconds of step 20: ") for line in lines)


def test_a_killed_run_is_a_fault_and_a_finished_one_has_its_code(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path / "small", steps=3, state=RUNNING)  # nobody holds it
    assert RunRecord.read(folder).state == State.KILLED
    assert main(["watch", "small", "--runs-dir", str(tmp_path)]) == 1
    record = RunRecord.read(folder)
    record.state, record.exit_code = "waiting for a decision", 4
    record.write()
    assert main(["watch", "small", "--runs-dir", str(tmp_path)]) == 4
