"""Runs on disk: found by name or folder, listed, stopped."""

import os
import signal
import socket
import time
from pathlib import Path

from pipeline.disk.lock import holder
from pipeline.disk.recorded import LINEAGE
from pipeline.disk.run_record import RUN, RunRecord, stage_alone
from pipeline.errors import RunStopped

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
