"""Weights & Biases, MLflow, trackio and SwanLab by their own libraries, offline: `make test-sinks` runs it.

Each stage here is reported twice, as one that was killed after step 5 and resumed from step 3. Files that a library
keeps for a later upload are read back: W&B's and SwanLab's with SwanLab's readers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from configs.sinks import SinkName
from pipeline.reports.report import Report
from pipeline.reports.sinks import OPENERS, TABLE_COLUMNS
from tests.jobs.recorded_runs import samples_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, OPENERS)), reason="`make test-sinks` installs the services' libraries"),
]
STEPS = [1, 2, 3, 4, 5, 6, 7, 8]
TABLES = [1, 2, 4, 6, 8]
KEY = "validation/sums/pass@1_greedy"


class Series(NamedTuple):
    """The content of a service: ids of the run's parts, values of KEY by step, tables of samples by step."""

    ids: set[str]
    values: list[tuple[int, float]]
    tables: list[dict[str, Any]]


def wandb_series(folder: Path) -> Series:
    from swanlab.converter.wb.wbdatastore import WBDataStoreReader
    from wandb.proto.wandb_internal_pb2 import Record

    ids, values = set[str](), list[tuple[int, float]]()
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        reader = WBDataStoreReader()
        reader.open(file)
        while (data := reader.scan()) is not None:
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                values.append((int(items["_step"]), json.loads(items[KEY])))
    tables = sorted(
        folder.glob("wandb/offline-run-*/files/media/table/*.json"), key=lambda file: file.stat().st_mtime_ns
    )
    return Series(ids, values, [json.loads(file.read_text()) for file in tables])


def mlflow_series(folder: Path) -> Series:
    from mlflow import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"] and runs[0].data.params["steps"] == "20"
    history = client.get_metric_history(runs[0].info.run_id, KEY.replace("@", "_"))
    tables = sorted(folder.glob("mlruns/*/*/artifacts/samples/*.json"))
    return Series({run.info.run_id for run in runs}, [(m.step, m.value) for m in history],
                  [json.loads(file.read_text()) for file in tables])  # fmt: skip


def trackio_series(folder: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    ids = SQLiteStorage.get_runs("alignyard")
    logs = SQLiteStorage.get_logs("alignyard", ids[0])
    tables = [
        {"columns": list(log["samples"]["_value"][0]), "data": [list(row.values()) for row in log["samples"]["_value"]]}
        for log in logs
        if "samples" in log
    ]
    return Series(set(ids), [(log["step"], log[KEY]) for log in logs], tables)


def swanlab_series(folder: Path) -> Series:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    ids, values = set[str](), list[tuple[int, float]]()
    for file in sorted(folder.glob("swanlog/*/*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record.FromString(data)
            assert not record.HasField("log"), "the console is not the service's"
            if record.HasField("start"):
                ids.add(record.start.id)
            if record.HasField("scalar") and record.scalar.key == KEY:
                values.append((record.scalar.step, record.scalar.value.number))
    files = sorted(folder.glob("swanlog/*/media/echarts/*.json"), key=lambda file: file.name)
    contents = [json.loads(file.read_text()) for file in files]
    return Series(
        ids,
        values,
        [
            {
                "columns": [c["field"] for c in content["colDefs"]],
                "data": [list(row.values()) for row in content["rowData"]],
            }
            for content in contents
        ],
    )


SERIES: dict[SinkName, Callable[[Path], Series]] = {
    "wandb": wandb_series,
    "mlflow": mlflow_series,
    "trackio": trackio_series,
    "swanlab": swanlab_series,
}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stage; no key is in the environment, and what libraries keep at home lies elsewhere."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "SWANLAB_", "HF_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "home").mkdir()
    folder = tmp_path / "demo" / "grpo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"type": "grpo", "steps": 20, "rewards": [{"name": "math"}]}))
    return folder


REPORTED = """
import sys
from pathlib import Path
from pipeline.reports import sinks
from pipeline.reports.report import Report
from tests.jobs.recorded_runs import samples_of
name, folder, first, last, close = sys.argv[1:]
sinks.SinkThread.close.__defaults__ = (float(close),)
with Report(Path(folder), total_steps=20, label="grpo", report_to=[name]) as report:
    report.resume(int(first) - 1)
    for step in range(int(first), int(last) + 1):
        report.step(step, {"validation/sums/pass@1_greedy": step / 10, "nothing": float("nan")}, samples_of(step))
"""


def reported(name: SinkName, folder: Path, first: int, last: int, close: float = 120) -> str:
    """The output of a process that reports steps of a stage; it must end by itself."""
    command = [sys.executable, "-c", REPORTED, name, str(folder), str(first), str(last), str(close)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", SERIES)
def test_a_resumed_stage_is_one_series_with_its_samples(name: SinkName, offline: Path) -> None:
    for first, last in ((1, 5), (4, 8)):
        output = reported(name, offline, first, last)
        assert "failed" not in output and "trying again" not in output
    series = SERIES[name](offline)
    assert series.ids == {json.loads((offline / "sinks" / f"{name}.json").read_text())["id"]}
    assert series.values == [(step, pytest.approx(step / 10)) for step in STEPS]
    assert [table["data"][0][0] for table in series.tables] == TABLES
    assert all(list(table["columns"]) == list(TABLE_COLUMNS) and len(table["data"]) == 6 for table in series.tables)
    assert series.tables[2]["data"][0][1:] == ["4+1=", "5 is right", "stop", 1.0, "math right 1"]


NOWHERE = "http://127.0.0.1:9"
AWAY: dict[SinkName, dict[str, str]] = {
    "wandb": {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": NOWHERE},
    "mlflow": {"MLFLOW_TRACKING_URI": NOWHERE},
    "trackio": {"TRACKIO_SERVER_URL": NOWHERE},
    "swanlab": {"SWANLAB_API_KEY": "0" * 21, "SWANLAB_API_HOST": NOWHERE, "SWANLAB_WEB_HOST": NOWHERE},
}


@pytest.mark.parametrize("name", AWAY)
def test_a_service_out_of_reach_stops_no_stage(name: SinkName, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in AWAY[name].items():
        monkeypatch.setenv(key, value)
    output = reported(name, offline, 1, 5, close=3)
    assert f"{name} failed (" in output or f"{name} did not take everything within 3 s" in output
    for secret in ("WANDB_API_KEY", "SWANLAB_API_KEY"):
        assert secret not in AWAY[name] or AWAY[name][secret] not in output


def test_the_report_imports_no_service_that_it_does_not_use(offline: Path) -> None:
    with Report(offline, total_steps=2, label="grpo") as report:
        report.step(1, {"loss": 1.0}, samples_of(1))
    assert not (offline / "sinks").exists()
