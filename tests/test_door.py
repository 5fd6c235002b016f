"""The Python door: its examples run, its errors are the command's, and a run is read while it goes on."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import alignyard
from jobs import runs
from pipeline.disk.lock import locked
from pipeline.disk.recorded import FIGURES, LINEAGE, METRICS
from pipeline.disk.run_record import LOG, RunRecord, StageRecord, State
from pipeline.errors import DecisionNeeded, RunStopped
from tests.settings import TINY_SFT
from tests.test_architecture import HOME

TINY_EVAL = """\
type: eval
model: {path: nowhere}
rollout: {max_model_len: 64, max_num_seqs: 16}
sampling: {max_tokens: 16}
suites:
  sums: {type: task, prompts: {source: {type: sums, size: 8, split: held_out}}, reward: {name: math}, samples: 0}
"""
HEAVY = ("run", "submit", "serve", "generate", "evaluate")
"""Functions whose examples start ranks or engines, in an order in which each finds what it needs."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the finished run `demo` of one stage, and the files that examples name."""
    monkeypatch.chdir(tmp_path)
    stage = tmp_path / "runs" / "demo" / "sft"
    stage.mkdir(parents=True)
    record = RunRecord("demo", str(stage.parent), {"sft": StageRecord("sft", [], state="done", job="a job")})
    record.state, record.exit_code = "done", 0
    record.write()
    rows = [{"step": 1, "loss/nll_mean": 5.5}, {"step": 2, "loss/nll_mean": 5.0}]
    (stage / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (stage / FIGURES).write_text(json.dumps({"loss/nll_mean": 5.0}))
    (tmp_path / "tiny_sft.yaml").write_text(TINY_SFT)
    (tmp_path / "tiny_eval.yaml").write_text(TINY_EVAL)
    return tmp_path


def examples() -> dict[str, doctest.DocTest]:
    """The examples of the door's names by name, `Run.metrics` for a method's."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    namespace = {name: getattr(alignyard, name) for name in alignyard.__all__}
    found = [test for module in (alignyard, runs) for test in finder.find(module, globs=namespace)]
    return {test.name.removeprefix("jobs.runs.").removeprefix("alignyard."): test for test in found if test.examples}


def test_every_function_has_an_example() -> None:
    functions = {name for name in alignyard.__all__ if name[0].islower()}
    assert {*examples()} >= functions | {"Run", "Run.metrics"}
    assert all(getattr(alignyard, name).__doc__ for name in alignyard.__all__)


@pytest.mark.parametrize("name", sorted({*examples()} - {*HEAVY}))
def test_examples_run(name: str, folder: Path) -> None:
    runner = doctest.DocTestRunner()
    said: list[str] = []
    assert not runner.run(examples()[name], out=said.append).failed, "".join(said)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.ranks
@pytest.mark.timeout(1800)
def test_examples_that_train_and_generate_run(folder: Path) -> None:
    """In a process of their own each, as in a notebook's kernel, whose standard output is a pipe."""
    for name in HEAVY:
        program = "from tests.test_door import examples; import doctest, sys; "
        program += f"sys.exit(doctest.DocTestRunner().run(examples()[{name!r}]).failed)"
        environment = os.environ | {"PYTHONPATH": str(HOME)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=550, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


def test_a_run_is_read_while_it_goes_on(folder: Path) -> None:
    run = alignyard.open_run("demo")
    file = run.folder / "sft" / METRICS
    with locked(run.folder):
        record = RunRecord.read(run.folder)
        record.state, record.stages["sft"].state = State.RUNNING, State.RUNNING
        record.write()
        with file.open("a") as lines:
            lines.write('{"step": 3, "loss/nll_mean": null}\n{"step": 4, "lo')  # torn, as a reader may find it
        metrics = run.metrics("sft")
        assert run.state == "running" and list(metrics.index) == [1, 2, 3]
        assert metrics["loss/nll_mean"].isna().tolist() == [False, False, True]
        with pytest.raises(TimeoutError):
            run.wait(timeout=0.01)
    with pytest.raises(RunStopped, match="killed"):
        run.wait()


@pytest.mark.parametrize(
    ("code", "error"),
    [(1, RuntimeError), (2, ValueError), (3, RunStopped), (4, DecisionNeeded), (130, KeyboardInterrupt)],
)
def test_a_run_that_ended_badly_raises_its_reason(folder: Path, code: int, error: type[BaseException]) -> None:
    record = RunRecord.read(folder / "runs" / "demo")
    record.state, record.exit_code, record.reason = "ended", code, "sft: too few cores"
    record.write()
    with pytest.raises(error, match="too few cores"):
        alignyard.open_run("demo").wait()


def test_a_run_that_was_refused_raises_its_message(folder: Path) -> None:
    refused = folder / "runs" / "refused"
    refused.mkdir()
    (refused / LOG).write_text("alignyard: needs 8 GPUs\n")
    with pytest.raises(ValueError, match=r"^needs 8 GPUs$"):
        runs.ended_well(refused, 2)


def test_what_the_conductor_refuses_is_raised_with_its_message(folder: Path) -> None:
    """Through the same process as the command's: the folder holds results of a stage that the recipe doesn't have."""
    (folder / "runs" / "demo" / "sft").rename(folder / "runs" / "demo" / "other")
    (folder / "runs" / "demo" / "other" / LINEAGE).write_text("{}")
    with pytest.raises(ValueError, match=r"run of another recipe, with results of other"):
        alignyard.submit("tiny_sft.yaml", output="runs/demo")


def test_wrong_input_is_refused_before_anything_starts(folder: Path) -> None:
    assert alignyard.load("tiny_eval.yaml").type == "eval"  # pyright: ignore
    sft = alignyard.load("tiny_sft.yaml", "steps=3")
    assert sft.steps == 3  # pyright: ignore
    with pytest.raises(ValueError, match="output=FOLDER"):
        alignyard.run(sft)
    with pytest.raises(ValueError, match="overrides go with a file"):
        alignyard.run(sft, "steps=2", output="runs/x")
    with pytest.raises(ValueError, match="go with a recipe"):
        alignyard.run("tiny_sft.yaml", only="sft")
    with pytest.raises(ValueError, match="the stages of demo are sft"):
        alignyard.open_run("demo").metrics("gone")
    with pytest.raises(ValueError, match="holds no run"):
        alignyard.open_run("gone")
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["demo"]


def test_rows_are_judged_alike_from_a_file_a_frame_and_mappings(folder: Path) -> None:
    rows = [
        {"prompt": "6*7=", "completion": "42", "gold": "42"},
        {"prompt": "6*7=", "completion": "41", "gold": "42"},
        {"prompt": "6*7=", "completion": "42", "gold": None},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frames = [alignyard.score("math", given, truth="gold") for given in ("rows.jsonl", pd.DataFrame(rows), rows)]
    for frame in frames:
        assert frame["status"].tolist() == ["ok", "ok", "bad_row"]
        assert frame["score"].iloc[:2].tolist() == [1.0, 0.0] and pd.isna(frame["score"].iloc[2])


@pytest.mark.parametrize("name", ["jobs", "rewards"])
def test_a_folder_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    """A notebook's own folder is the first on Python's path."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(HOME)])}
    command = [sys.executable, "-c", "import alignyard"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "rename folders and files called jobs" in done.stderr and name in done.stderr


def test_the_import_is_light() -> None:
    program = "import sys, alignyard; print({'torch', 'ray', 'vllm', 'pandas', 'transformers'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
