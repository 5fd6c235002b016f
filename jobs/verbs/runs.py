"""`alignyard list | status | logs | stop`: runs, seen from any shell.

The state of a run is read from its folder. Where that folder is on another machine, the job server of the run's
cluster is asked instead.
"""

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Argument, Option

from jobs.command import ERR, OUT, Address, RunName, RunsDir, plain_table, verb_app
from jobs.runs import all_records, find_run, stop_run
from jobs.start import follow, write
from pipeline.disk.ending import Ending
from pipeline.disk.lock import holder
from pipeline.disk.run_record import CONSOLE, LOG, RUN, RunRecord, StageRecord, State
from pipeline.reports.files import duration

if TYPE_CHECKING:
    from jobs.submission import Jobs, RunJob

app = verb_app()
STATE_COLOURS = {
    **dict.fromkeys(("done", "reused", "succeeded"), "green"),
    **dict.fromkeys(("waiting", "pending"), ""),
    **dict.fromkeys(("left out", "not reached"), "dim"),
    State.RUNNING: "bold",
}
"""Colours of our states and of Ray's job states; any other is red."""


@app.command("list")
def list_runs(runs_dir: RunsDir = Path("runs"), address: Address = "") -> int:
    """List the runs and single stages below a folder, or the runs of a cluster, with their states.

    \b
    Examples:
      alignyard list
      alignyard list --address http://head:8265
    """
    table = plain_table("run", "state", "stages", "started", "folder")
    records: list[RunRecord] = []
    damaged: dict[Path, str] = {}
    if address:
        from jobs.submission import Jobs

        for job in Jobs(address).of_runs():
            if not job.stage:
                table.add_row(job.run, _state(job.state), "", _clock(job.started), job.folder)
    else:
        records, damaged = all_records(runs_dir)
    for record in records:
        num_done = sum(stage.state == Ending.DONE.word for stage in record.stages.values())
        stages = f"{num_done} of {len(record.stages)} done"
        table.add_row(record.name, _state(record.state), stages, _clock(record.started), record.folder)
    for folder in damaged:
        table.add_row(folder.name, _state("damaged"), "", "", str(folder))
    OUT.print(table)
    _print_damaged(damaged)
    return 0


@app.command()
def status(
    run: Annotated[str | None, Argument(metavar="RUN", help="Name or folder of the run. [default: the newest]")] = None,
    runs_dir: RunsDir = Path("runs"),
    address: Address = "",
) -> int:
    """Show the stages of a run: their states, their times, and the reason why one waits or failed.

    \b
    Examples:
      alignyard status
      alignyard status demo
      alignyard status demo --address http://head:8265
    """
    if address:
        return _print_jobs(run, address)
    if run is None:
        _print_damaged(all_records(runs_dir)[1])
    record = find_run(run, runs_dir)
    headline = Text(f"{record.name}: ") + _state(record.state)
    if record.state == State.RUNNING:
        headline.append(f" for {duration(time.time() - record.started)}")
        headline.append(f", cluster {record.address}" if record.address else "")
        headline.append(f", Ray job {record.job}" if record.job else f", process {record.pid} on {record.host}")
    elif record.reason:
        headline.append(f": {record.reason}")
    OUT.print(headline, soft_wrap=True)
    is_alone = not any(stage.job for stage in record.stages.values())
    table = plain_table("stage", "type", "state", "since", "took", *([] if is_alone else ["job"]))
    for name, stage in record.stages.items():
        took = duration((stage.ended or time.time()) - stage.started) if stage.started and stage.job else ""
        state = _state("reused" if stage.reused else stage.state)
        cells = (name, stage.type, state, _clock(stage.started), took)
        table.add_row(*cells, *([] if is_alone else [stage.job]))
    OUT.print(table)
    for name, stage in record.stages.items():  # below the table, whose cells would wrap long texts
        reason = _reason(Path(record.folder) / name, stage)
        if reason and reason != record.reason:
            OUT.print(Text(f"{name}: {reason}"), soft_wrap=True)
    return 0


def _reason(folder: Path, stage: StageRecord) -> str:
    """The reason why a stage waits or ended badly; of a gate that a person has decided on since, the decision."""
    if stage.state == Ending.DONE.word:
        return ""
    if stage.type == "gate" and stage.state != State.RUNNING:
        from pipeline.gates.decision import read_decision

        decision = read_decision(folder)
        if decision is not None and decision.decided_by == "user":
            return f"a person decided: {decision.action.replace('_', ' ')}; carried out when the recipe is run again"
    return stage.reason.split("\n")[0]


def _print_jobs(run: str | None, address: str) -> int:
    from jobs.submission import Jobs

    table = plain_table("stage", "state", "since", "took", "job")
    for job in _jobs_of(run, Jobs(address)):
        took = duration((job.ended or time.time()) - job.started)
        table.add_row(job.stage or "(the run)", _state(job.state), _clock(job.started), took, job.id)
    OUT.print(table)
    return 0


@app.command()
def logs(
    run: RunName,
    stage: Annotated[str | None, Argument(metavar="STAGE", help="Only the output of this stage.")] = None,
    follow_log: Annotated[bool, Option("-f", "--follow", help="Continue until the run ends.")] = False,
    runs_dir: RunsDir = Path("runs"),
    address: Address = "",
) -> int:
    """Print the output of a run, or of one of its stages.

    \b
    Examples:
      alignyard logs demo -f
      alignyard logs demo grpo
    """
    if address:
        return _print_job_log(run, address, stage or "", follow_log)
    record = find_run(run, runs_dir)
    if not (Path(record.folder) / RUN).is_file():
        return _print_steps(Path(record.folder), follow_log)
    if stage is not None and stage not in record.stages:
        raise ValueError(f"STAGE='{stage}': stages of {record.name}: {', '.join(record.stages)}")
    if record.job and stage is None:
        return _print_job_log(run, record.address, "", follow_log)
    folder = Path(record.folder)
    file = folder / stage / CONSOLE if stage else folder / LOG
    if not file.is_file() and not follow_log:
        raise ValueError(f"'{stage or record.name}' has no output yet: {file} does not exist")
    while not file.is_file() and holder(folder):
        time.sleep(0.5)
    if file.is_file():
        follow(file, 0, lambda: not follow_log or not holder(folder))
    return 0


def _print_steps(folder: Path, follow_log: bool) -> int:
    """Prints the steps of a stage that was run alone from its figures: its output went to its own terminal."""
    from pipeline.disk.recorded import read_config
    from pipeline.reports.files import read_metrics
    from pipeline.reports.report import StepLines

    steps = read_config(folder).get("steps") or 0
    lines, shown = StepLines(steps), 0
    while True:
        is_last = not follow_log or not holder(folder)
        rows = read_metrics(folder)
        for row in rows[shown:]:
            values = {key: value for key, value in row.items() if key != "step"}
            write("".join(f"{line.plain}\n" for line in lines.lines(int(row["step"]), values)))
        shown = len(rows)
        if is_last:
            break
        time.sleep(0.5)
    if not shown:
        OUT.print(f"no step yet; report: {folder / 'report.html'}", soft_wrap=True)
    return 0


def _print_job_log(run: str, address: str, stage: str, follow_log: bool) -> int:
    """Prints the output of the newest job of `stage`; of the conductor's where `stage` is empty."""
    from jobs.submission import Jobs

    server = Jobs(address)
    jobs = [job for job in _jobs_of(run, server) if job.stage == stage]
    if not jobs:
        raise ValueError(f"STAGE='{stage}': no such job of the run on {address}")
    running = [job for job in jobs if not job.is_over]
    job = [*jobs, *running][-1].id  # a running job goes before a newer one that was refused
    if follow_log:
        server.follow(job, write)
    else:
        write(server.logs(job))
    return 0


@app.command()
def stop(run: RunName, runs_dir: RunsDir = Path("runs"), address: Address = "") -> int:
    """Stop a run and all of its jobs. The same `alignyard run` continues it from its last checkpoint.

    \b
    Example:
      alignyard stop demo
    """
    if not address:
        record = find_run(run, runs_dir)
        going_on = "stopped {}; `alignyard run` with the same recipe continues it"
        OUT.print((going_on if stop_run(record) else "{} is not running").format(record.name), soft_wrap=True)
        return 0
    from jobs.submission import Jobs

    server = Jobs(address)
    running = [job.id for job in _jobs_of(run, server) if not job.is_over]
    survivors = server.stop(running)
    OUT.print(f"stopped {', '.join(running)}" if running else f"{run} is not running", soft_wrap=True)
    if survivors:
        OUT.print(f"did not stop: {', '.join(survivors)}", style="red", soft_wrap=True)
    return Ending.STOPPED if survivors else 0


def _print_damaged(damaged: dict[Path, str]) -> None:
    for message in damaged.values():
        ERR.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _jobs_of(run: str | None, server: "Jobs") -> list["RunJob"]:
    """The jobs of a run on a cluster. Raises ValueError if there are none, or if two runs have the name."""
    jobs = server.of_runs()
    name = run or (jobs[-1].run if jobs else "")
    jobs = [job for job in jobs if name in (job.run, job.folder)]
    folders = sorted({job.folder for job in jobs})
    if len(folders) > 1:
        raise ValueError(f"RUN='{name}' is the name of several runs; give its folder: {', '.join(folders)}")
    if not jobs:
        raise ValueError(f"RUN='{name}': no jobs of such a run on {server.address}")
    return jobs


def _state(state: str) -> Text:
    return Text(state, style=STATE_COLOURS.get(state, "red"))


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
