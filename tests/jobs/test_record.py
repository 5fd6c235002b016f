"""`list`, `status` and `logs` on damaged, read-only and moved run folders; starts that are refused."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from jobs.cli import main
from jobs.command import OUT, begin_anew, exit_code, explain
from jobs.conductor import conduct
from jobs.order import Order
from jobs.start import write
from jobs.submission import Jobs, RunJob
from jobs.verbs import run as run_verb
from pipeline.disk.ending import Ending
from pipeline.disk.lock import LOCK, locked
from pipeline.disk.run_record import LOG, RUN, RunRecord, StageRecord
from pipeline.gates.decision import Decision, write_decision
from pipeline.run.lineage import write_lineage


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, `good` and the newer `other`."""
    monkeypatch.setattr(OUT, "width", 200)
    for number, name in enumerate(("good", "other")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / LOG).write_text(f"{name} prints\n")
        (folder / LOCK).touch()
        RunRecord(
            name, str(folder), {"sft": StageRecord("sft", [], state="done")}, state="done", started=number
        ).write()
    return tmp_path


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def damage_file(file: Path, damage: str) -> None:
    match damage:
        case "empty":
            file.write_text("")
        case "cut":
            file.write_text(file.read_text()[:50])
        case "zeros":
            file.write_bytes(bytes(file.stat().st_size))
        case "no stages":
            change(file, stages=None)
        case "wrong type":
            change(file, started="yesterday")


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "no stages", "wrong type"])
def test_a_damaged_run_is_named_and_the_others_are_shown(
    runs: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_file(runs / "other" / RUN, damage)
    assert main(["list", "--runs-dir", str(runs)]) == 0
    printed = capsys.readouterr()
    assert "1 of 1 done" in printed.out and "damaged" in printed.out
    assert str(runs / "other" / RUN) in printed.err and "writes it anew" in printed.err
    assert main(["status", "--runs-dir", str(runs)]) == 0
    printed = capsys.readouterr()
    assert "good: done" in printed.out and str(runs / "other" / RUN) in printed.err
    assert main(["status", "good", "--runs-dir", str(runs)]) == 0
    capsys.readouterr()
    assert main(["status", "other", "--runs-dir", str(runs)]) == Ending.WRONG_INPUT
    assert str(runs / "other" / RUN) in capsys.readouterr().err


def test_keys_of_another_version_are_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"sft": {"type": "sft", "waits_for": [], "state": "done", "colour": "red"}}
    change(runs / "good" / RUN, invented=1, stages=stages)
    assert main(["status", "good", "--runs-dir", str(runs)]) == 0
    assert "good: done" in capsys.readouterr().out


def test_a_moved_run_is_known_by_its_new_place(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "good").rename(runs / "renamed")
    assert main(["list", "--runs-dir", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert str(runs / "renamed") in printed and "good" not in printed
    assert main(["logs", "renamed", "--runs-dir", str(runs)]) == 0
    assert capsys.readouterr().out == "good prints\n"


def test_a_missing_run_is_reported_with_the_folders_searched(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "gone", "--runs-dir", str(runs)]) == Ending.WRONG_INPUT
    assert str(runs / "gone") in capsys.readouterr().err


@contextmanager
def read_only() -> Iterator[None]:
    """While the block runs every file system is read-only, for root too."""
    plain_open, plain_mkdir = Path.open, Path.mkdir

    def open_to_read(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system", str(path))
        return plain_open(path, mode, *args, **kwargs)

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if not path.is_dir():
            raise OSError(30, "Read-only file system", str(path))
        plain_mkdir(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_to_read)
        patch.setattr(Path, "mkdir", mkdir)
        yield


RECIPE = """
name: {name}
runs_dir: {runs}
stages:
  sft:
    type: sft
    model: {{init_config: tiny}}
    data: {{source: {{type: sums, size: 20}}}}
    conversations_per_step: 2
    steps: 1
    optimizer: {{learning_rate: 1e-3}}
"""


def test_a_folder_that_cannot_be_written_to_is_shown_and_a_start_refused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(runs / "good" / RUN, state="running")
    recipe, stage = runs / "recipe.yaml", runs / "stage.yaml"
    recipe.write_text(RECIPE.format(name="good", runs=runs))
    stage.write_text(textwrap.dedent(RECIPE.partition("  sft:\n")[2]).format())
    with read_only():
        for verb in (["status", "good"], ["list"], ["logs", "good"], ["logs", "good", "-f"]):
            assert main([*verb, "--runs-dir", str(runs)]) == 0
        printed = capsys.readouterr().out
        assert "killed" in printed and "good prints" in printed
        for start in (["run", str(recipe)], ["sft", str(stage), "--output", str(runs / "good")]):
            assert main(start) == Ending.WRONG_INPUT
            assert "can't be written to" in capsys.readouterr().err


def order_of(folder: Path, text: str) -> Order:
    from configs.load import load_config
    from configs.stages import Recipe

    file = folder / "recipe.yaml"
    file.write_text(text)
    recipe = load_config(str(file), [], Recipe).config
    return Order(recipe=recipe, folder=Path(recipe.runs_dir, recipe.name).absolute(), working_directory=folder)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing starts."""

    def start() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("jobs.conductor.cluster_with_jobs", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_another_recipe_under_the_name_of_a_run_with_results_is_refused(runs: Path, no_ray: None) -> None:
    before = (runs / "good" / RUN).read_bytes()
    for stage, result in (("reason", "metrics.jsonl"), ("empty", "")):
        (runs / "good" / stage).mkdir()
        (runs / "good" / stage / "lineage.json").write_text("{}")
        if result:
            (runs / "good" / stage / result).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"results of reason, which .*another name \(name=NAME\)"):
        conduct(order_of(runs, RECIPE.format(name="good", runs=runs)))
    assert (runs / "good" / RUN).read_bytes() == before


def test_an_impossible_demand_is_refused_before_ray_starts(
    runs: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cluster.demand import Node

    monkeypatch.setattr("pipeline.cluster.machine.this_machine", lambda: Node("this machine", 2, 1, 2, 1))
    text = RECIPE.format(name="good", runs=runs) + "    trainer: {num_ranks: 2}\n"
    with pytest.raises(ValueError, match=r"sft: asks for 2 GPUs .* lower trainer\.num_ranks"):
        conduct(order_of(runs, text))


def test_a_run_whose_record_is_damaged_is_started_all_the_same(
    runs: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "good" / RUN).write_text("")
    with pytest.raises(AssertionError, match="Ray was started"):
        conduct(order_of(runs, RECIPE.format(name="good", runs=runs)))
    assert "is empty" in capsys.readouterr().out
    assert RunRecord.read(runs / "good").state == "failed"


def test_a_run_of_which_all_is_done_says_so_without_a_cluster(
    runs: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    order = order_of(runs, RECIPE.format(name="whole", runs=runs))
    config, folder = order.recipe.stages["sft"], order.folder / "sft"
    write_lineage(folder, "sft", config, config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "figures.json").write_text('{"train/loss": 1.0}')
    assert conduct(order) == Ending.DONE
    printed = capsys.readouterr().out
    assert "reused" in printed and "1 of 1 stages done" in printed and "no cluster is started" in printed
    record = RunRecord.read(order.folder)
    assert record.state == "done" and record.stages["sft"].reused

    with pytest.raises(ValueError, match="seed: was 0, is 1"):
        conduct(order_of(runs, RECIPE.format(name="whole", runs=runs) + "    seed: 1\n"))
    with pytest.raises(AssertionError, match="Ray was started"):
        conduct(order_of(runs, RECIPE.format(name="whole", runs=runs).replace("steps: 1", "steps: 2")))


def test_a_full_disk_is_explained_in_a_sentence() -> None:
    for number in (28, 122):
        message, code = explain(OSError(number, os.strerror(number), "runs/x/metrics.jsonl"))
        assert code == 3 and "no room for 'runs/x/metrics.jsonl'" in message and "the same command goes on" in message
    assert explain(OSError(5, "Input/output error", "x"))[1] == 1


def test_other_faults_of_files_keep_their_traceback() -> None:
    def verb() -> int:
        raise FileNotFoundError(2, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        exit_code(verb, resumes=False)


def test_a_reader_that_closes_the_output_ends_the_writer_without_a_traceback() -> None:
    program = f"from jobs.start import {write.__name__}\nfor _ in range(100000): write('a line of some length\\n')"
    # vLLM, once imported here, preloads libgomp from a path in which ld.so takes no blanks.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == Ending.OUTPUT_CLOSED


class JobServer:
    """A cluster whose conductor of `good` runs, and where a later start of it was refused."""

    def __init__(self, address: str) -> None:
        self.address = address

    def of_runs(self) -> list[RunJob]:
        def job(name: str, *, is_over: bool) -> RunJob:
            return RunJob(name, "good", FOLDER, "", "", is_over, 0.0, None)

        return [job("older", is_over=True), job("running", is_over=False), job("refused", is_over=True)]

    def running(self, folder: Path, *, stages: bool) -> list[str]:
        return Jobs.running(cast(Jobs, self), folder, stages=stages)

    def logs(self, job: str) -> str:
        return f"{job} prints\n"

    def submit(self, *_: Any, **__: Any) -> None:
        raise AssertionError("submitted")


FOLDER = "/shared/runs/good"


@pytest.fixture
def job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.submission.Jobs", JobServer)


def test_logs_are_those_of_the_running_job(job_server: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "good", "--address", "http://head:8265"]) == 0
    assert capsys.readouterr().out == "running prints\n"


def test_a_run_that_a_cluster_runs_already_is_not_submitted_again(
    job_server: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "stage.yaml"
    stage.write_text(textwrap.dedent(RECIPE.partition("  sft:\n")[2]).format())
    submit = ["submit", "sft", str(stage), "--address", "http://head:8265", "--output"]
    assert main([*submit, FOLDER]) == Ending.WRONG_INPUT
    assert "is being written by Ray job running" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="submitted"):
        main([*submit, str(tmp_path / "new")])


def alone(folder: Path, *, steps: int = 3, done: bool = True) -> Path:
    """A stage that was run without a recipe."""
    folder.mkdir()
    created = "2026-01-01T00:00:00+00:00"
    model = {"head": "LlamaForCausalLM", "folder": "base", "tokenizer": "a" * 64, "chat_template": "", "files": {}}
    record = {"type": "sft", "created": created, "models": {"model": model}, "data": {}, "rewards": {}, "parents": []}
    (folder / "lineage.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps({"type": "sft", "steps": steps}))
    rows = ({"step": step, "loss/nll_mean": 1 / step} for step in range(1, steps + done))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (folder / "figures.json").write_text("{}")
    return folder


def test_a_stage_that_was_run_alone_is_listed_shown_and_drawn(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(runs / "single")
    alone(runs / "half", done=False)
    options = ["--runs-dir", str(runs)]
    assert main(["list", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("single") == 2 and "unfinished" in printed and "1 of 1 done" in printed
    assert main(["status", "single", *options]) == 0 and main(["status", "half", *options]) == 0
    printed = capsys.readouterr().out
    assert "single: done" in printed and "half: unfinished: the same command resumes it" in printed
    assert main(["logs", "single", *options]) == 0
    printed = capsys.readouterr().out
    assert "loss" in printed and "3/3" in printed and "0.3333" in printed
    assert main(["lineage", "single", *options]) == 0
    assert "single (sft) done" in capsys.readouterr().out
    assert main(["stop", "half", *options]) == 0
    assert "half is not running" in capsys.readouterr().out


def test_a_long_reason_stands_below_the_table(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OUT, "width", 80)
    reason = "the run stopped itself: " + "word " * 30 + "end"
    stage = {"type": "sft", "waits_for": [], "state": "stopped itself", "reason": reason, "job": "good-sft-1"}
    change(runs / "good" / RUN, stages={"sft": stage}, state="stopped itself")
    assert main(["status", "good", "--runs-dir", str(runs)]) == 0
    assert f"sft: {reason}" in capsys.readouterr().out.splitlines()


def test_a_persons_decision_is_in_the_status(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "good" / "gate"
    folder.mkdir()
    write_decision(folder, Decision("promote", [], {}, decided_by="user"))
    stage = {"type": "gate", "waits_for": [], "state": "stopped itself", "reason": "fails", "job": "good-gate-1"}
    change(runs / "good" / RUN, stages={"gate": stage}, state="stopped itself", reason="fails")
    assert main(["status", "good", "--runs-dir", str(runs)]) == 0
    assert "gate: a person decided: promote" in capsys.readouterr().out


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("alignyard 0.")


def test_a_stage_begins_anew_and_its_earlier_results_are_kept(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        folder = alone(runs / "single")
        begin_anew([folder])
        assert not folder.exists() and (runs / f"before-{number}" / "single" / "figures.json").is_file()
        assert f"before-{number}/single" in capsys.readouterr().out
    assert main(["list", "--runs-dir", str(runs)]) == 0
    assert "before" not in capsys.readouterr().out
    with locked(alone(runs / "single")), pytest.raises(ValueError, match="is being written by"):
        begin_anew([runs / "good", runs / "single"])
    assert (runs / "good").is_dir() and (runs / "single").is_dir()  # none was moved


def test_the_chosen_stages_of_a_run_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_verb, "start_order", lambda *_, **__: 0)
    recipe = str(Path(__file__).parents[1] / "configs" / "recipe.yaml")
    for stage in ("warm", "reason"):
        (tmp_path / "small" / stage).mkdir(parents=True)
    line = ["run", recipe, "name=small", f"runs_dir={tmp_path}", "--from", "reason", "--fresh"]
    assert main(line) == 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["before-1", "warm"]
    assert main([*line, "--dry-run"]) == Ending.WRONG_INPUT
