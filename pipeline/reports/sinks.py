"""Figures and samples of a stage in Weights & Biases, MLflow, trackio or SwanLab, by their own libraries.

A thread for each service follows the stage's files, `metrics.jsonl` and `rollouts/`, so nothing is queued in memory, a
service that is slow or away never holds a step up, and what it missed is sent later or by the next start.
`sinks/NAME.json` keeps the service's id of the run and the last step that was sent, so a resumed stage continues its
series.
Keys come from the environment alone; without one, runs are kept offline in the stage's folder.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

from configs.load import leaves
from configs.sinks import SinkName
from pipeline.disk.files import read_json_or_none, write_atomic
from pipeline.disk.recorded import CONFIG, METRICS
from pipeline.reports.files import read_json_lines
from pipeline.reports.samples import rollout_answer, rollout_files

PROJECT = "alignyard"
"""Project or experiment, where the service's own variable of the environment names none."""
SINKS = "sinks"
TABLE_COLUMNS = ("step", "prompt", "completion", "finish_reason", "reward", "verdicts")
CLOSE_SECONDS = 30.0
"""Longest wait at the end of a stage for what is not sent yet."""
_ATTEMPTS, _PAUSE_SECONDS = 4, 1.0
"""Times that a step is tried to be sent, and the first pause between; each further one is four times as long."""
_TABLES = 10
"""Tables of samples over a whole stage."""

TableRow = list[Any]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SinkRun:
    """A stage as a run of a service. folder: the stage's. id: the service's name for it; None before its first start.
    config: the stage's settings."""

    folder: Path
    id: str | None
    config: Mapping[str, Any]

    @property
    def group(self) -> str:
        """Name of the run that the stage belongs to."""
        return self.folder.resolve().parent.name

    @property
    def name(self) -> str:
        """Name of the run and the stage."""
        return f"{self.group}-{self.folder.resolve().name}"


class Sink(Protocol):
    """A run of a service that is open."""

    id: str

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[TableRow]) -> None:
        """Send the finite figures of a step, and samples with `TABLE_COLUMNS`, maybe none. Raises what the library
        raises."""
        ...

    def close(self) -> None:
        """Send what is left and end the run."""
        ...


class _LibraryRun:
    """A run object of a service's library that takes a step's figures and its table together.

    make_table: builds the library's table of rows.
    """

    def __init__(self, run: Any, make_table: Callable[[Sequence[TableRow]], Any]) -> None:
        self._run, self._make_table = run, make_table

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[TableRow]) -> None:
        values: dict[str, Any] = dict(figures)
        if table:
            values["samples"] = self._make_table(table)
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _Wandb(_LibraryRun):
    def __init__(self, run: SinkRun) -> None:
        wandb: Any = import_module("wandb")

        offline = not os.environ.get("WANDB_API_KEY") and not os.environ.get("WANDB_MODE")
        self.id = run.id or uuid.uuid4().hex[:12]
        opened = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=run.group,
            name=run.name,
            job_type=str(run.config.get("type")),
            id=self.id,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            mode="offline" if offline else None,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, init_timeout=CLOSE_SECONDS),
        )
        super().__init__(opened, lambda rows: wandb.Table(columns=list(TABLE_COLUMNS), data=list(rows)))


class _Mlflow:
    def __init__(self, run: SinkRun) -> None:
        client: Any = import_module("mlflow").MlflowClient
        entities: Any = import_module("mlflow.entities")

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run.folder.resolve() / "mlruns").as_uri()
        self._client, self._metric = client(tracking_uri=uri), entities.Metric
        if run.id:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(number, run_name=run.name, tags={"group": run.group}).info.run_id
        params = [entities.Param(self._key(key), str(value)[:500]) for key, value in leaves(dict(run.config))]
        for first in range(0, len(params), 100):  # the protocol's limit
            self._client.log_batch(self.id, params=params[first : first + 100])

    @staticmethod
    def _key(name: str) -> str:
        return re.sub(r"[^\w./ -]", "_", name)

    def log(self, step: int, figures: Mapping[str, float], table: Sequence[TableRow]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(self._key(key), value, now, step) for key, value in figures.items()]
        self._client.log_batch(self.id, metrics=metrics)
        if table:  # `log_table` needs pandas; this is the file that it writes
            values = {"columns": TABLE_COLUMNS, "data": table}
            self._client.log_text(self.id, json.dumps(values, ensure_ascii=False), f"samples/step-{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self.id)


class _Trackio(_LibraryRun):
    def __init__(self, run: SinkRun) -> None:
        trackio: Any = import_module("trackio")

        self.id = run.id or f"{run.name}-{uuid.uuid4().hex[:6]}"  # it knows runs by their names
        opened = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            name=self.id,
            group=run.group,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        super().__init__(opened, lambda rows: trackio.Table(columns=list(TABLE_COLUMNS), data=list(rows)))


class _Swanlab(_LibraryRun):
    def __init__(self, run: SinkRun) -> None:
        swanlab: Any = import_module("swanlab")

        offline = not os.environ.get("SWANLAB_API_KEY") and not os.environ.get("SWANLAB_MODE")
        self.id = run.id or uuid.uuid4().hex[:21]
        opened = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT") or PROJECT,
            name=run.name,
            group=run.group,
            job_type=str(run.config.get("type")),
            id=self.id,
            resume="allow",
            config=dict(run.config),
            log_dir=str(run.folder / "swanlog"),
            mode="offline" if offline else None,
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # the console is the stage's own
        )
        super().__init__(opened, lambda rows: swanlab.echarts.Table().add(list(TABLE_COLUMNS), [*map(list, rows)]))


OPENERS: dict[SinkName, Callable[[SinkRun], Sink]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
    "swanlab": _Swanlab,
}


def refuse_missing_sinks(names: Sequence[SinkName]) -> None:
    """Raise ValueError for a service whose library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"report_to={name} needs a package that is not installed: `pip install 'alignyard[{name}]'`, or remove "
                "it from report_to"
            )


class SinkThread(Thread):
    """Follows the files of a stage and sends every step once to one service."""

    def __init__(self, name: SinkName, folder: Path, *, total_steps: int) -> None:
        super().__init__(name=f"sink-{name}", daemon=True)
        self.messages: list[str] = []
        """Sentences for the log, which the stage's own thread prints."""
        self._sink_name: SinkName = name
        self._folder = folder
        self._table_every = max(total_steps // _TABLES, 1)
        self._file = folder / SINKS / f"{name}.json"
        self._wake, self._closing = Event(), Event()
        self._sent = 0

    def step_is_written(self) -> None:
        """Let the thread look for new steps."""
        self._wake.set()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left, for at most so many seconds."""
        self._closing.set()
        self._wake.set()
        self.join(seconds)
        if self.is_alive():
            self.messages.append(
                f"{self._sink_name} did not take everything within {seconds:g} s; metrics.jsonl has all, and the next "
                "start of an unfinished stage sends the rest"
            )

    def run(self) -> None:
        """Open the service's run and send steps until the stage closes."""
        state = read_json_or_none(self._file) or {}
        self._sent = int(state.get("step", 0))
        sink: Sink | None = None
        try:
            config = read_json_or_none(self._folder / CONFIG) or {}
            sink = self._tried(lambda: OPENERS[self._sink_name](SinkRun(self._folder, state.get("id"), config)))
            self._write(sink)
            self._follow(sink)
            sink.close()
        except Exception as error:  # noqa: BLE001  # a service may raise anything, and the stage goes on
            if sink is not None:
                self._write(sink)
            self.messages.append(
                f"{self._sink_name} failed ({type(error).__name__}: {error}); the stage goes on without it, and "
                "metrics.jsonl has all figures"
            )

    def _follow(self, sink: Sink) -> None:
        offset = 0
        while True:
            is_last = self._closing.is_set()  # before reading, so that no last step is missed
            self._wake.clear()
            rows, offset = _rows_from(self._folder / METRICS, offset)
            for row in rows:
                if row["step"] > self._sent:
                    self._send(sink, row)
                    self._sent = int(row["step"])
            self._write(sink)
            if is_last:
                break
            self._wake.wait()

    def _send(self, sink: Sink, row: Mapping[str, float | None]) -> None:
        step = int(row["step"] or 0)
        figures = {key: value for key, value in row.items() if key != "step" and value is not None}
        is_due = step == 1 or step % self._table_every == 0
        file = rollout_files(self._folder).get(step) if is_due else None
        table = [_table_row(step, record) for record in read_json_lines(file)] if file else []
        self._tried(lambda: sink.log(step, figures, table))

    def _tried(self, action: Callable[[], _T]) -> _T:
        """The value of `action`, tried several times while the stage goes on."""
        for number in range(_ATTEMPTS - 1):
            try:
                return action()
            except Exception as error:  # noqa: BLE001  # as in `run`
                if number == 0:
                    self.messages.append(f"{self._sink_name}: {type(error).__name__}: {error}; trying again")
                if self._closing.wait(_PAUSE_SECONDS * 4**number):
                    break
        return action()

    def _write(self, sink: Sink) -> None:
        self._file.parent.mkdir(exist_ok=True)
        write_atomic(self._file, json.dumps({"id": sink.id, "step": self._sent}))


def _rows_from(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of whole lines after `offset`, and the offset behind them."""
    if not file.is_file():
        return [], offset
    with file.open("rb") as lines:
        lines.seek(offset)
        whole = lines.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line], offset + len(whole) + bool(whole)


def _table_row(step: int, record: Mapping[str, Any]) -> TableRow:
    """A sample with `TABLE_COLUMNS`; lone surrogates, which no service takes, are escaped."""
    texts = (record["prompt"], record["completion"], record["finish_reason"])
    prompt, completion, finish = (text.encode("utf-8", "backslashreplace").decode() for text in texts)
    return [step, prompt, completion, finish, record["reward"], rollout_answer("", dict(record)).verdict]
