"""Runs, watched from any shell: `alignyard list | status | logs | stop`.

What stands in a run's folder tells most; where that lies on another machine, the job server of its cluster is asked.
"""

import argparse
import os
import signal
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from jobs.command import ERR, OUT, STOPPED, Verbs, add_verb, duration
from jobs.verbs.run import add_address, address_of, follow, write

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from jobs.submission import Jobs
    from pipeline.disk.run_record import RunRecord

LIST = """\
Lists the runs below a folder, or those of a cluster, with what became of them.

examples:
  alignyard list
  alignyard list --address http://head:8265
"""
STATUS = """\
Shows a run's stages: what they wait for, since when they run, why they failed. RUN is a name below --runs-dir, or a
folder; without one it is the run that was last touched.

examples:
  alignyard status
  alignyard status demo
  alignyard status demo --address http://head:8265
"""
LOGS = """\
Prints what a run, or one of its stages, has said; with -f also what it says until it ends.

examples:
  alignyard logs demo -f
  alignyard logs demo grpo
"""
STOP = """\
Stops a run and all of its jobs. `alignyard run` with the same recipe goes on from its last checkpoint.

example:
  alignyard stop demo
"""
COLOURS = {"done": "green", "running": "bold", "waiting": "", "left out": "dim", "not reached": "dim"}
STOP_SECONDS = 90.0


def add_watch(verbs: Verbs) -> None:
    """Adds the four verbs."""
    listing = add_verb(verbs, "list", _list, "the runs there are", LIST)
    status = add_verb(verbs, "status", _status, "how far a run is", STATUS)
    logs = add_verb(verbs, "logs", _logs, "what a run says", LOGS)
    stop = add_verb(verbs, "stop", _stop, "stop a run", STOP)
    status.add_argument("run", metavar="RUN", nargs="?", help="name or folder of the run (default: the newest)")
    for parser in (logs, stop):
        parser.add_argument("run", metavar="RUN", help="name or folder of the run")
    logs.add_argument("stage", metavar="STAGE", nargs="?", help="only this one of its stages")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    for parser in (listing, status, logs, stop):
        parser.add_argument(
            "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="folder of the runs (default: runs)"
        )
        add_address(parser)


def _list(args: argparse.Namespace) -> int:
    table = _table("run", "state", "stages", "started", "folder")
    if address := address_of(args):
        from jobs.submission import FOLDER_KEY, RUN_KEY, STAGE_KEY, Jobs

        for job in Jobs(address).of_runs():
            told = job.metadata or {}
            if not told[STAGE_KEY]:
                table.add_row(told[RUN_KEY], _state(job.status.lower()), "", _clock(_started(job)), told[FOLDER_KEY])
    records, damaged = ([], {}) if address else _records(args.runs_dir)
    for record in records:
        done = sum(stage.state == "done" for stage in record.stages.values())
        stages = f"{done} of {len(record.stages)} done"
        table.add_row(record.name, _state(record.state), stages, _clock(record.started), record.folder)
    for folder in damaged:
        table.add_row(folder.name, _state("damaged"), "", "", str(folder))
    OUT.print(table)
    _tell_damaged(damaged)
    return 0


def _status(args: argparse.Namespace) -> int:
    if address_of(args):
        return _status_of_jobs(args)
    record = _find(args)
    head = Text(f"{record.name}: ") + _state(record.state)
    if record.state == "running":
        since = f" for {_ago(record.started)}, cluster {record.address}" if record.address else ""
        head.append(f"{since}, {f'Ray job {record.job}' if record.job else f'process {record.pid} on {record.host}'}")
    else:
        head.append(f": {record.reason}" if record.reason else "")
    OUT.print(head, soft_wrap=True)
    table = _table("stage", "type", "state", "since", "took", "job", "")
    for name, stage in record.stages.items():
        took = duration((stage.ended or time.time()) - stage.started) if stage.started and stage.job else ""
        state = "reused" if stage.reused else stage.state
        reason = Text("" if stage.state == "done" else stage.reason.split("\n")[0])
        table.add_row(name, stage.type, _state(state), _clock(stage.started), took, stage.job, reason)
    OUT.print(table)
    return 0


def _status_of_jobs(args: argparse.Namespace) -> int:
    from jobs.submission import STAGE_KEY, Jobs

    table = _table("stage", "state", "since", "took", "job")
    for job in _jobs_of(args, Jobs(address_of(args))):
        ended = job.end_time / 1000 if job.end_time else time.time()
        table.add_row(
            (job.metadata or {})[STAGE_KEY] or "(the run)",
            _state(job.status.lower()),
            _clock(_started(job)),
            duration(ended - _started(job)),
            str(job.submission_id),
        )
    OUT.print(table)
    return 0


def _logs(args: argparse.Namespace) -> int:
    from pipeline.disk.lock import holder
    from pipeline.disk.run_record import CONSOLE, LOG

    if address_of(args):
        return _logs_of_job(args, address_of(args), newest=args.stage or "")
    record = _find(args)
    if args.stage is not None and args.stage not in record.stages:
        raise ValueError(f"STAGE='{args.stage}': stages of {record.name}: {', '.join(record.stages)}")
    folder = Path(record.folder)
    if record.job and args.stage is None:
        return _logs_of_job(args, record.address, newest="")
    file = folder / args.stage / CONSOLE if args.stage else folder / LOG
    if not file.is_file() and not args.follow:
        raise ValueError(f"'{args.stage or record.name}' has said nothing yet: {file} is not there")
    while not file.is_file() and holder(folder):
        time.sleep(0.5)
    if file.is_file():
        follow(file, 0, lambda: not args.follow or not holder(folder))
    return 0


def _logs_of_job(args: argparse.Namespace, address: str, newest: str) -> int:
    from jobs.submission import STAGE_KEY, Jobs

    jobs = Jobs(address)
    of_stage = [job for job in _jobs_of(args, jobs) if (job.metadata or {})[STAGE_KEY] == newest]
    running = [job for job in of_stage if not job.status.is_terminal()]
    job = next(reversed([*of_stage, *running]), None)  # the one that runs, before a newer one that was refused
    if job is None:
        raise ValueError(f"STAGE='{newest}': no such job of the run on {address}")
    if args.follow:
        jobs.follow(str(job.submission_id), write)
    else:
        write(jobs.logs(str(job.submission_id)))
    return 0


def _stop(args: argparse.Namespace) -> int:
    address = address_of(args)
    record = None if address else _find(args)
    if record is not None and not record.job:
        return _stop_process(record)
    from jobs.submission import Jobs

    jobs = Jobs(record.address if record is not None else address)
    running = [str(job.submission_id) for job in _jobs_of(args, jobs) if not job.status.is_terminal()]
    left = jobs.stop(running)
    OUT.print(f"stopped {', '.join(running)}" if running else f"{args.run} is not running", soft_wrap=True)
    if left:
        OUT.print(f"did not stop: {', '.join(left)}", style="red", soft_wrap=True)
    return STOPPED if left else 0


def _stop_process(record: "RunRecord") -> int:
    from pipeline.disk.lock import holder

    folder = Path(record.folder)
    if not holder(folder):
        OUT.print(f"{record.name} is not running")
        return 0
    if record.host != socket.gethostname():
        raise ValueError(f"{record.name} runs on {record.host}; stop it there")
    os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while holder(folder):
        if time.monotonic() > deadline:
            raise ValueError(f"{record.name} (process {record.pid}) has not stopped within {STOP_SECONDS:g} s")
        time.sleep(0.1)
    OUT.print(f"stopped {record.name}; `alignyard run` with the same recipe goes on")
    return 0


def _find(args: argparse.Namespace) -> "RunRecord":
    """The run that the command line means. Raises ValueError where there is none."""
    from pipeline.disk.run_record import RUN, RunRecord

    if args.run is None:
        records, damaged = _records(args.runs_dir)
        _tell_damaged(damaged)
        if not records:
            raise ValueError(f"no runs below '{args.runs_dir}'; --runs-dir says where they are")
        return records[-1]
    places = [args.runs_dir / args.run, Path(args.run)]
    folder = next((place for place in places if (place / RUN).is_file()), None)
    if folder is None:
        folders = " nor ".join(f"'{place.absolute()}'" for place in places)
        raise ValueError(
            f"RUN='{args.run}' holds no run: there is no {RUN} in {folders} (a stage that was run alone keeps none); "
            "--runs-dir says where runs are, `alignyard list` shows them"
        )
    return RunRecord.read(folder)


def _records(runs: Path) -> tuple[list["RunRecord"], dict[Path, str]]:
    """The runs below a folder, oldest first, and the reasons of those that can't be read, by their folders."""
    from pipeline.disk.run_record import RUN, RunRecord

    records: list[RunRecord] = []
    damaged: dict[Path, str] = {}
    for file in sorted(runs.glob(f"*/{RUN}")):
        try:
            records.append(RunRecord.read(file.parent))
        except ValueError as error:
            damaged[file.parent] = str(error)
    return sorted(records, key=lambda record: record.started), damaged


def _tell_damaged(damaged: dict[Path, str]) -> None:
    for reason in damaged.values():
        ERR.print(reason, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _jobs_of(args: argparse.Namespace, jobs: "Jobs") -> list["JobDetails"]:
    """The jobs of a run on a cluster. Raises ValueError where there are none, or where the name stands for two runs."""
    from jobs.submission import FOLDER_KEY, RUN_KEY

    ours = jobs.of_runs()
    name = args.run or next((job.metadata[RUN_KEY] for job in reversed(ours) if job.metadata), "")
    found = [job for job in ours if job.metadata and name in (job.metadata[RUN_KEY], job.metadata[FOLDER_KEY])]
    folders = sorted({(job.metadata or {})[FOLDER_KEY] for job in found})
    if len(folders) > 1:
        raise ValueError(f"RUN='{name}' stands for several runs; give its folder: {', '.join(folders)}")
    if not found:
        raise ValueError(f"RUN='{name}': no jobs of such a run on {jobs.address}")
    return found


def _started(job: "JobDetails") -> float:
    return (job.start_time or 0) / 1000


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def _state(state: str) -> Text:
    colours = {**COLOURS, "reused": "green", "succeeded": "green", "pending": ""}
    return Text(state, style=colours.get(state, "red"))


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _ago(seconds: float) -> str:
    return duration(time.time() - seconds)
