"""Services beside TensorBoard: each step is sent once, also after a resume; one that fails holds nothing up."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from configs.stages import Recipe, sinks_of
from pipeline.reports import sinks
from pipeline.reports.report import Report
from pipeline.reports.sinks import SinkRun, refuse_missing_sinks
from pipeline.run.stage import check_stage
from tests.jobs.recorded_runs import SMALL, samples_of
from tests.waiting import wait_until


class Service:
    """A service in memory. failures: times that it raises before it takes a step. gate: it waits for this first."""

    def __init__(self, failures: int = 0, gate: threading.Event | None = None) -> None:
        self.runs: list[SinkRun] = []
        self.steps: list[int] = []
        self.figures: list[Mapping[str, float]] = []
        self.tables: dict[int, Sequence[Any]] = {}
        self.closed = 0
        self._failures, self._gate = failures, gate
        self.id = "run-1"

    def open(self, run: SinkRun) -> "Service":
        self.runs.append(run)
        return self

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[Any]) -> None:
        if self._gate is not None:
            self._gate.wait()
        if self._failures:
            self._failures -= 1
            raise ConnectionError("no route")
        self.steps.append(step)
        self.figures.append(figures)
        if table:
            self.tables[step] = table

    def close(self) -> None:
        self.closed += 1


def serve(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setitem(sinks.OPENERS, "wandb", service.open)
    monkeypatch.setattr(sinks, "_PAUSE_SECONDS", 0.01)


def record(folder: Path, first: int, last: int) -> None:
    with Report(folder, total_steps=20, label="grpo", report_to=["wandb"]) as report:
        report.resume(first - 1)
        for step in range(first, last + 1):
            report.step(step, {"loss": step / 10, "nothing": float("nan")}, samples_of(step))


def test_a_resumed_stage_continues_its_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    serve(monkeypatch, service)
    folder = tmp_path / "demo" / "grpo"
    record(folder, 1, 5)
    record(folder, 4, 8)  # the newest checkpoint was of step 3: 4 and 5 come again, the same to the bit
    assert service.steps == [1, 2, 3, 4, 5, 6, 7, 8] and service.closed == 2
    assert service.figures[2] == {"loss": 0.3}, "what is not finite is left out"
    assert [(run.id, run.name, run.group) for run in service.runs] == [
        (None, "demo-grpo", "demo"), ("run-1", "demo-grpo", "demo"),
    ]  # fmt: skip
    assert list(service.tables) == [1, 2, 4, 6, 8]  # ten tables of twenty steps, and the first
    step, prompt, completion, finish, reward, verdict = service.tables[4][0]
    assert (step, prompt, completion, finish, reward) == (4, "4+1=", "5 is right", "stop", 1.0)
    assert verdict == "math right 1"


def test_a_service_that_comes_back_gets_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(failures=2)
    serve(monkeypatch, service)
    with Report(tmp_path, total_steps=20, label="sft", report_to=["wandb"]) as report:
        report.step(1, {"loss": 1.0})
        wait_until(lambda: service.steps)
        report.step(2, {"loss": 1.0})
    assert service.steps == [1, 2]


def test_a_service_that_fails_stops_nothing_and_catches_up_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, Service(failures=1000))
    record(tmp_path, 1, 3)
    printed = " ".join(capsys.readouterr().out.split())
    assert "wandb failed (ConnectionError: no route)" in printed and printed.count("wandb failed") == 1
    service = Service()
    serve(monkeypatch, service)
    record(tmp_path, 4, 4)
    assert service.steps == [1, 2, 3, 4]


def test_a_service_that_hangs_slows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    serve(monkeypatch, Service(gate=gate))
    monkeypatch.setattr(sinks.SinkThread.close, "__defaults__", (0.5,))
    record(tmp_path, 1, 20)  # would wait for ever
    gate.set()
    assert "wandb did not take everything within 0.5 s" in " ".join(capsys.readouterr().out.split())


def test_a_stage_reports_where_its_recipe_does_unless_it_says_otherwise() -> None:
    recipe = load_config(str(SMALL), ["report_to=[mlflow]", "stages.grpo.report_to=[]"], Recipe).config
    assert sinks_of(recipe.stages["sft"], recipe) == ["mlflow"]
    assert sinks_of(recipe.stages["sft"], None) == sinks_of(recipe.stages["grpo"], recipe) == []
    recipe = load_config(str(SMALL), ["stages.sft.report_to=[trackio]"], Recipe).config
    assert sinks_of(recipe.stages["sft"], recipe) == ["trackio"]


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to=swanlab.*alignyard\[swanlab\]"):
        refuse_missing_sinks(["swanlab"])
    recipe = load_config(str(SMALL), ["report_to=[wandb]"], Recipe).config
    with pytest.raises(ValueError, match="report_to=wandb"):
        check_stage(recipe.stages["sft"], recipe)
