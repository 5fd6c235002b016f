"""A real run of a recipe on this machine: watched, detached, stopped, killed, and resumed.

Everything happens once, in one story, because a Ray cluster and a training stage take seconds to start.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.disk.lock import holder
from pipeline.disk.run_record import RunRecord
from rewards.sandbox.cgroup import family
from tests.series import series

pytestmark = pytest.mark.ranks

SECONDS = 240
"""Limit for steps that take ten seconds on an idle machine."""
STEPS = 80
STAGE = """
    type: sft
    model: {model}
    data: {{source: {{type: sums, size: 200}}, max_length: 64}}
    conversations_per_step: 8
    steps: {steps}
    optimizer: {{learning_rate: 5e-3}}
    trainer: {{threads: 1}}
    checkpoint: {{every_steps: 4}}
"""
START, NEXT = "{init_config: tiny}", '{path: "stage:first"}'
RECIPE = "name: story\nstages:" + "".join(
    f"\n  {name}:{STAGE.format(model=model, steps=steps)}"
    for name, model, steps in (("first", START, 2), ("left", NEXT, STEPS), ("right", NEXT, STEPS))
)


def _default_sighup() -> None:
    """Restores SIGHUP's effect, which nohup disables for these tests and their children."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass
class Story:
    """Outputs, exit codes and states of the story, by label."""

    folder: Path
    outputs: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "story"

    @property
    def record(self) -> RunRecord:
        return RunRecord.read(self.run)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name("alignyard")), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "200"},
            start_new_session=True,
            preexec_fn=_default_sighup,
        )

    def call(self, *arguments: str, label: str = "") -> str:
        process = self.start(*arguments)
        output = process.communicate(timeout=SECONDS)[0]
        label = label or arguments[0]
        self.outputs[label], self.codes[label] = output, process.returncode
        return output

    def rows(self, stage: str) -> list[dict[str, float]]:
        file = self.run / stage / "metrics.jsonl"
        return series(file) if file.is_file() else []


def wait(until: Callable[[], bool], what: str, story: Story) -> None:
    deadline = time.monotonic() + SECONDS
    while not until():
        over = story.record.state in ("done", "failed", "stopped itself")
        assert time.monotonic() < deadline and not over, f"{what}: never\n{(story.run / 'run.log').read_text()}"
        time.sleep(0.1)


def free(story: Story) -> bool:
    """True if no process writes in the run's folder."""
    return not any(holder(folder) for folder in (story.run, *story.run.iterdir()) if folder.is_dir())


@contextmanager
def paused(pids: list[int]) -> Iterator[None]:
    """Stops these processes while the block runs."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # ended by the block
                os.kill(pid, signal.SIGCONT)


def stages(story: Story, *names: str) -> list[int]:
    """Ids of the processes that run these stages."""
    return [int(holder(story.run / name).split()[1]) for name in names]


def ranks(story: Story) -> list[int]:
    """Ids of the training processes below the conductor, whose cluster they belong to."""
    pids: list[int] = []
    for pid in family(story.record.pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if Path(f"/proc/{pid}/comm").read_text().startswith("ray::TrainActor"):
                pids.append(pid)
    return pids


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    story = Story(tmp_path_factory.mktemp("story"))
    (story.folder / "story.yaml").write_text(RECIPE)

    foreground = story.start("run", "story.yaml")
    while not (story.run / "run.json").is_file():
        assert foreground.poll() is None
    wait(lambda: min(len(story.rows("left")), len(story.rows("right"))) >= 3, "both stages train", story)
    with paused(stages(story, "left", "right")):  # so that what follows has the time it takes
        for verb in ("status", "list", "logs"):
            story.call(verb, *(["story"] if verb != "list" else []))
        story.call("run", "story.yaml", label="second run")
        conductor = story.record.pid
        foreground.send_signal(signal.SIGHUP)
        foreground.wait(timeout=SECONDS)
        rows_before = len(story.rows("left"))
    wait(lambda: len(story.rows("left")) > rows_before, "the run goes on without its terminal", story)
    story.facts["alive after SIGHUP"] = story.record.pid == conductor and bool(holder(story.run))

    training = ranks(story)
    assert len(training) == 2
    with paused(training):  # a stop takes its time where much else runs
        story.call("stop", "story")
    story.states["stopped"] = story.record.state
    story.facts["free after stop"] = free(story)
    story.facts["unfinished"] = len(story.rows("left")) < STEPS

    story.call("run", "story.yaml", "--detach", label="detached")
    wait(lambda: all(holder(story.run / name) for name in ("left", "right")), "both run again", story)
    with paused(stages(story, "right")):  # so that it isn't done before the conductor has noticed
        os.kill(*stages(story, "left"), signal.SIGKILL)
        wait(lambda: story.record.stages["left"].state == "failed", "a killed stage is noticed", story)
        killed, rows_before = story.record.stages["left"], len(story.rows("right"))
    story.facts["killed stage"] = (killed.exit_code, killed.reason)
    wait(lambda: len(story.rows("right")) > rows_before, "the other stage goes on", story)
    story.facts["the other"] = story.record.stages["right"].state
    os.kill(story.record.pid, signal.SIGKILL)
    wait(lambda: story.record.state == "killed", "the run counts as killed", story)
    story.call("status", "story", label="status of the killed")
    story.facts["log of the killed"] = (story.run / "run.log").read_text()
    wait(lambda: free(story), "a killed conductor's stages end", story)

    story.call("run", "story.yaml", label="whole")
    story.call("logs", "story", "left", label="logs of a stage")
    return story


@pytest.mark.timeout(1200)
def test_another_shell_sees_what_runs(story: Story) -> None:
    status = story.outputs["status"]
    assert "story: running" in status and "first" in status and "story-left-" in status
    assert "story" in story.outputs["list"] and "1 of 3 done" in story.outputs["list"]
    assert "[left]" in story.outputs["logs"]  # `right` prints at the same time
    assert f"1/{STEPS}" in story.outputs["logs of a stage"] and "[left]" not in story.outputs["logs of a stage"]


def test_closing_the_terminal_changes_nothing(story: Story) -> None:
    assert story.facts["alive after SIGHUP"]


def test_a_run_has_one_conductor(story: Story) -> None:
    assert story.codes["second run"] == 2
    assert "is being written by process" in story.outputs["second run"]


def test_stop_ends_every_process_and_keeps_the_checkpoints(story: Story) -> None:
    assert story.codes["stop"] == 0 and story.states["stopped"] == "interrupted"
    assert story.facts["free after stop"] and story.facts["unfinished"]


def test_a_killed_stage_is_reported_and_stops_no_other(story: Story) -> None:
    code, reason = story.facts["killed stage"]
    assert code == 1 and reason.startswith("its process ended without a word: ")
    assert f"left failed: {reason}" in story.facts["log of the killed"]
    assert story.facts["the other"] == "running"


def test_a_killed_conductor_is_recognised(story: Story) -> None:
    assert "the same command resumes it" in story.outputs["status of the killed"]


def test_a_killed_run_resumes_to_the_same_figures(story: Story) -> None:
    assert story.codes["whole"] == 0, story.outputs["whole"]
    assert [row["step"] for row in story.rows("left")] == list(range(1, STEPS + 1))
    assert story.rows("left") == story.rows("right")  # the same settings, interrupted at other steps
    reused = [line for line in story.outputs["whole"].splitlines() if line.startswith("first")]
    assert "reused" in reused[0]


def test_independent_stages_run_side_by_side(story: Story) -> None:
    left, right = story.record.stages["left"], story.record.stages["right"]
    assert left.started and right.started and left.ended and right.ended
    assert max(left.started, right.started) < min(left.ended, right.ended)
    assert left.job != right.job


def test_a_difference_from_a_finished_stage_is_named(
    story: Story, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(story.folder)
    code = main(["run", "story.yaml", "--dry-run", f"stages.left.steps={STEPS - 1}"])
    printed = capsys.readouterr()
    assert code == 2 and f"steps: was {STEPS}, is {STEPS - 1}" in printed.out + printed.err
