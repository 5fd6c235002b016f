"""The quick half of the fault suite: one stage through a killed rank, a stopped one and a damaged training state, and
the words for what ended."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

import pipeline.train.calls
import rollout.actors
from configs.sampling import RolloutConfig
from jobs.machine import stopped_processes
from pipeline.cluster.room import cluster
from pipeline.errors import RunStopped
from pipeline.run.stage import run_stage
from pipeline.train.calls import RankCalls
from pipeline.train.worker import TrainingRanks
from pipeline.weights.fresh import create_model
from rollout.actors import EngineActors, RolloutError, death
from tests.faults.cases import FAULTS, flip_bit
from tests.faults.run import BEGIN, END, PAGE, Measured, main, table
from tests.faults.run_folder import Run
from tests.pipeline.stage_configs import SUMS, sft
from tests.waiting import wait_until


def test_the_page_has_the_faults_of_the_suite_in_its_order() -> None:
    lines = [line for line in PAGE.read_text().partition(BEGIN)[2].splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]]
    assert names == [fault.name for fault in FAULTS if fault.name in names]


def test_faults_that_are_not_injected_keep_their_rows() -> None:
    first, second = FAULTS[0].name, FAULTS[1].name
    page = table(f"# Faults\n{BEGIN}\n{END}\nafter\n", {first: Measured("a | b", told=3.4), second: Measured("c")})
    page = table(page, {second: Measured("d", lost=2, rows=[])})
    assert f"| {first} | a \\| b |  | 3 |" in page and f"| {second} | d | 2 |  |  | equal |" in page
    assert "| c |" not in page and page.endswith(f"{END}\nafter\n")


def test_processes_that_a_signal_stopped_are_named_but_for_those_that_judge() -> None:
    sleep = "import time; time.sleep(600)"
    judge = f"import subprocess, sys; 'rewards.pool.supervise'; subprocess.run([sys.executable, '-c', {sleep!r}])"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in (sleep, sleep, judge)]
    programs = b""
    try:
        while not (programs := subprocess.run(["pgrep", "-P", str(processes[2].pid)], capture_output=True).stdout):
            continue
        for pid in (processes[1].pid, processes[2].pid, int(programs)):
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: processes[1].pid in stopped_processes())
        assert set(stopped_processes()) == {processes[1].pid}
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        os.kill(int(programs), signal.SIGKILL)


def test_the_end_of_an_actor_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "The actor is dead because its worker process has died. Some common causes include: (1) many."
    error = ActorDiedError()
    error.error_msg = f"The actor died unexpectedly.\n\tclass_name: EngineActor\n\tpid: 71\n\tip: 10.0.0.1\n{words}"
    monkeypatch.setattr(rollout.actors, "killed_by_kernel", lambda pid: False)
    assert death(error) == "process 71 on 10.0.0.1 ended without a word, as after a kill or a lack of memory"
    monkeypatch.setattr(rollout.actors, "killed_by_kernel", lambda pid: pid == 71)
    assert death(error).startswith("process 71 on 10.0.0.1 was ended for lack of memory: lower rollout.kv_cache_gib")
    assert "lack of memory" in death(OutOfMemoryError("Task was killed due to the node running low on memory."))


@pytest.mark.parametrize("cause", [MemoryError("no page"), type("OutOfMemoryError", (RuntimeError,), {})("no block")])
def test_a_call_that_runs_out_of_memory_names_the_settings_that_help(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    def get(*_: Any, **__: Any) -> Any:
        raise RayTaskError("call", "Traceback", cause)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(pipeline.train.calls, "_death", lambda calls: None)
    engines = object.__new__(EngineActors)
    engines._config = RolloutConfig(max_model_len=32)
    helps = rf"lack of memory: lower rollout\.kv_cache_gib, .*{cause}"
    with pytest.raises(RolloutError, match=f"rollout engine 0, a generation: {helps}"):
        engines._get(None, 0, "a generation")
    with pytest.raises(RunStopped, match=f"'forward_backward': {helps}"):
        RankCalls([], 1.0)._get([], "forward_backward", 1.0)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_stage_goes_through_a_killed_and_a_stopped_rank_and_a_damaged_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third step is done three times, the fourth twice, with the same figures."""
    create_model("tiny", 0, tmp_path / "lm")
    data = {"source": SUMS, "max_length": 64}
    config = sft(tmp_path / "lm", data=data, steps=6, checkpoint={"every_steps": 2}, trainer={"threads": 1})
    run = Run(tmp_path)
    run.stage = tmp_path / "harmed"
    forward_backward, updates = TrainingRanks.forward_backward, [0]
    rows: list[list[dict[str, float]]] = []

    def harmed(self: TrainingRanks, *args: Any) -> Any:
        updates[0] += 1
        pid: Any = ray.get(self._ranks[0].__ray_call__.remote(lambda _: os.getpid()))
        if updates[0] == 4:
            rows.append(run.rows())
            os.kill(pid, signal.SIGKILL)
        if updates[0] == 7:  # after a restart, step 5
            rows.append(run.rows())
            os.kill(pid, signal.SIGSTOP)
            self._timeout = 2
        return forward_backward(self, *args)

    monkeypatch.setattr("pipeline.cluster.start.cluster", nullcontext)  # one of Ray for all starts
    with cluster():
        with monkeypatch.context() as patch:
            patch.setattr(TrainingRanks, "forward_backward", harmed)
            with pytest.raises(RunStopped, match=r"within 2 s; late: rank 0 \(process \d+ on .*, stopped\); raise"):
                run_stage(config, run.stage)
        assert "restart 1 of 2" in capsys.readouterr().out and run.saved_step == 4
        flip_bit(run)
        run_stage(config, run.stage)
    assert "set aside as step-4.damaged, resumes from step 2" in "".join(capsys.readouterr().out.splitlines())
    assert [len(each) for each in rows] == [3, 4] and run.step == 6
    assert rows[0] == rows[1][:3] and rows[1] == run.rows()[:4]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.ranks
@pytest.mark.timeout(3000)
def test_the_command_goes_through_faults_of_every_kind(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert main(tmp_path, ["9` of an engine", "9` of the conductor", "a bit flipped", "1e200"], page) == 0
    assert page.read_text().count("equal") == 3
