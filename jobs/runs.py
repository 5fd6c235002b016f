"""Runs on disk: found by name or folder, listed, stopped, and read as data frames."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.disk.ending import Ending
from pipeline.disk.lock import holder
from pipeline.disk.recorded import LINEAGE, read_figures
from pipeline.disk.run_record import CONSOLE, LOG, RUN, RunRecord, State, stage_alone
from pipeline.errors import DecisionNeeded, RunStopped

if TYPE_CHECKING:
    from pandas import DataFrame

STOP_TIMEOUT_SECONDS = 90.0


def find_run(run: str | None, runs_dir: Path) -> RunRecord:
    """The run by its name below `runs_dir` or by its folder, or else the newest. Raises ValueError if there is none."""
    if run is None:
        records, _ = all_records(runs_dir)
        if not records:
            raise ValueError(f"no runs below '{runs_dir}'; --runs-dir says where they are")
        return records[-1]
    folders = [runs_dir / run, Path(run)]
    for folder in folders:
        if (folder / RUN).is_file():
            return RunRecord.read(folder)
        if (alone := stage_alone(folder)) is not None:
            return alone
    places = " nor ".join(f"'{folder.absolute()}'" for folder in folders)
    raise ValueError(
        f"RUN='{run}' holds no run: there is no {RUN} in {places}; --runs-dir says where runs are, `alignyard list` "
        "shows them"
    )


def stage_folders(record: RunRecord, only: str | None = None) -> dict[str, Path]:
    """The folders of a run's stages by name, or the one of the stage `only`. Raises ValueError for an unknown stage."""
    folder = Path(record.folder)
    is_alone = not (folder / RUN).is_file()
    folders = {name: folder if is_alone else folder / name for name in record.stages}
    if only is not None and only not in folders:
        raise ValueError(f"--stage {only}: stages of {record.name}: {', '.join(folders)}")
    return folders if only is None else {only: folders[only]}


def all_records(runs_dir: Path) -> tuple[list[RunRecord], dict[Path, str]]:
    """The runs below a folder, oldest first, and the error message of each unreadable one by its folder."""
    records: list[RunRecord] = []
    damaged: dict[Path, str] = {}
    for folder in sorted({file.parent for name in (RUN, LINEAGE) for file in runs_dir.glob(f"*/{name}")}):
        try:
            records.append(stage_alone(folder) or RunRecord.read(folder))
        except ValueError as error:
            damaged[folder] = str(error)
    return sorted(records, key=lambda record: record.started), damaged


def stop_run(record: RunRecord) -> bool:
    """Stop a run with all of its jobs, and return whether it was running.

    Raises ValueError for a process of another machine, RunStopped for what has not ended within a minute and a half.
    """
    return _stop_jobs(record) if record.job else _stop_process(record)


def _stop_jobs(record: RunRecord) -> bool:
    from jobs.submission import Jobs

    server, jobs = Jobs(record.address), {record.job, *(stage.job for stage in record.stages.values())}
    running = [job.id for job in server.of_runs() if job.id in jobs and not job.is_over]
    if survivors := server.stop(running):
        raise RunStopped(f"did not stop: {', '.join(survivors)}")
    return bool(running)


def _stop_process(record: RunRecord) -> bool:
    folder = Path(record.folder)
    if not holder(folder):
        return False
    if record.host != socket.gethostname():
        raise ValueError(f"{record.name} runs on {record.host}; stop it there")
    os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while holder(folder):
        if time.monotonic() > deadline:
            raise RunStopped(f"{record.name} (process {record.pid}) has not stopped within {STOP_TIMEOUT_SECONDS:g} s")
        time.sleep(0.1)
    return True


def ended_well(folder: Path, code: int) -> "Run":
    """The run in `folder`. Raises the exception that an exit code other than 0 stands for, with the run's reason."""
    if code == 0:
        return Run(folder)
    reason = RunRecord.read(folder).reason if (folder / RUN).is_file() else ""
    if not reason:  # a run that was refused has none; its message is the last line of the log
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines() if (folder / LOG).is_file() else []
        reason = next((line.removeprefix("alignyard: ") for line in reversed(lines) if line.strip()), "no reason known")
    errors = {Ending.WRONG_INPUT: ValueError, Ending.STOPPED: RunStopped, Ending.UNDECIDED: DecisionNeeded}
    if code == Ending.INTERRUPTED:
        raise KeyboardInterrupt(reason)
    raise errors.get(Ending(code), RuntimeError)(reason)


class Run:
    """A run on disk, or a stage that was run alone. Every call reads the files anew, so it may still be going on.

    >>> demo = open_run("demo")
    >>> demo.stages()["state"].to_dict()
    {'sft': 'done'}
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError for a folder without a run."""
        self.folder = Path(folder).absolute()
        self.record()

    def __repr__(self) -> str:
        """`Run('demo', done, .../runs/demo)`."""
        return f"Run({self.name!r}, {self.state}, {self.folder})"

    def record(self) -> RunRecord:
        """The state of the run as its folder has it now."""
        return find_run(str(self.folder), Path())

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def state(self) -> str:
        """`running`, `done`, `failed`, `stopped itself`, `interrupted`, ... as `alignyard status` shows it."""
        return self.record().state

    def stages(self) -> "DataFrame":
        """The stages by name: type, state, reason, started, ended, reused."""
        import pandas as pd

        rows = {
            name: {
                "type": stage.type,
                "state": stage.state,
                "reason": stage.reason,
                "started": _time(stage.started),
                "ended": _time(stage.ended),
                "reused": stage.reused,
            }
            for name, stage in self.record().stages.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def metrics(self, stage: str | None = None) -> "DataFrame":
        """The figures of each step, a column a metric, by step; of all stages by (stage, step).

        >>> open_run("demo").metrics("sft")["loss/nll_mean"].tolist()
        [5.5, 5.0]
        """
        import pandas as pd

        from pipeline.reports.files import read_metrics

        frames = {name: pd.DataFrame(read_metrics(folder)) for name, folder in self._folders(stage).items()}
        indexed = {name: frame.set_index("step") for name, frame in frames.items() if len(frame)}
        if not indexed:
            return pd.DataFrame()
        if stage is not None or not (self.folder / RUN).is_file():
            return next(iter(indexed.values()))
        return pd.concat(indexed, names=["stage"])

    def figures(self) -> "DataFrame":
        """The last figures of each finished stage: a row a figure, a column a stage.

        >>> open_run("demo").figures().loc["loss/nll_mean", "sft"]
        np.float64(5.0)
        """
        import pandas as pd

        figures = {name: read_figures(folder) for name, folder in self._folders().items()}
        return pd.DataFrame({name: values for name, values in figures.items() if values is not None})

    def rollouts(self, stage: str | None = None) -> "DataFrame":
        """Sampled completions with their scores and verdicts, of at most 100 steps; of all stages by default.

        >>> open_run("demo").rollouts().empty
        True
        """
        import pandas as pd

        from pipeline.reports.samples import read_rollouts

        rows = [
            {"stage": name, "step": step, **sample}
            for name, folder in self._folders(stage).items()
            for step, samples in read_rollouts(folder).items()
            for sample in samples
        ]
        return pd.DataFrame(rows)

    def checkpoint(self, stage: str | None = None) -> Path:
        """The folder of a stage's model, for `generate`, `evaluate`, `serve` and `transformers`; of the last stage that
        has one by default. Raises ValueError where there is none."""
        from jobs.serving import checkpoint_folder

        folders = list(self._folders(stage).values())
        if stage is None:
            folders = [folder for folder in folders if (folder / "hf" / "config.json").is_file()][-1:] or folders[-1:]
        return checkpoint_folder(str(folders[0]))

    def log(self, stage: str | None = None) -> str:
        """The output so far, of the run or of one stage; empty for a stage that was run alone, which printed it."""
        file = self.folder / LOG if stage is None else self._folders(stage)[stage] / CONSOLE
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def wait(self, timeout: float | None = None) -> "Run":
        """Wait until the run is over. Raises as `run`, and TimeoutError after `timeout` seconds, while the run goes
        on."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (record := self.record()).state == State.RUNNING:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} still runs after {timeout:g} s")
            time.sleep(0.5)
        if not record.exit_code and record.state != Ending.DONE.word:
            raise RunStopped(f"{self.name} is {record.state}: {record.reason}")
        return ended_well(self.folder, record.exit_code or 0)

    def stop(self) -> bool:
        """Stop the run; `run` and `submit` continue it. Returns False where it is not running."""
        return stop_run(self.record())

    def _folders(self, stage: str | None = None) -> dict[str, Path]:
        """The folder of each stage, or of one. Raises ValueError for a stage that the run doesn't have."""
        folders = stage_folders(self.record())
        if stage is not None and stage not in folders:
            raise ValueError(f"stage='{stage}': the stages of {self.name} are {', '.join(folders)}")
        return folders if stage is None else {stage: folders[stage]}


def _time(seconds: float | None) -> Any:
    import pandas as pd

    return None if seconds is None else pd.Timestamp(seconds, unit="s")
