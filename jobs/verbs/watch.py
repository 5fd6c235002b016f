"""`alignyard watch RUN`: a run as it goes on."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated

from rich.console import Group
from rich.live import Live
from rich.text import Text
from typer import Argument

from jobs.command import OUT, RunsDir, one_line, spark_levels, verb_app
from jobs.runs import find_run, stage_folders
from pipeline.disk.ending import Ending
from pipeline.disk.files import read_json_or_none
from pipeline.disk.recorded import CONFIG, METRICS
from pipeline.disk.run_record import RunRecord, State
from pipeline.reports.files import duration, read_json_lines, read_metrics

app = verb_app()
_SECONDS = 1.0
_CURVES, _SAMPLES, _PACE_STEPS = 5, 4, 20


@app.command("watch")
def watch_run(
    run: Annotated[str | None, Argument(metavar="RUN", help="Name or folder of the run. [default: the newest]")] = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Watch a run until it ends: its stages, and of those that run the step, curves, seconds and newest samples.

    The exit code is the run's. Interrupting this command does not interrupt the run. Where output is no terminal, or
    one that can't move its cursor, lines are printed instead.

    \b
    Example:
      alignyard watch demo
    """
    record = find_run(run, runs_dir)
    record = _live(record) if OUT.is_terminal and not OUT.is_dumb_terminal else _lines(record)
    reason = f": {record.reason}" if record.reason else ""
    OUT.print(Text(f"{record.name}: {record.state}{reason}"), soft_wrap=True)
    if record.exit_code is not None:
        return record.exit_code
    return Ending.FAULT if record.state == State.KILLED else 0


def _live(record: RunRecord) -> RunRecord:
    with Live(console=OUT, auto_refresh=False, transient=False) as live:
        while True:
            record = find_run(record.folder, Path())
            live.update(Group(*_view(record)), refresh=True)
            if record.state != State.RUNNING:
                return record
            time.sleep(_SECONDS)


def _lines(record: RunRecord) -> RunRecord:
    """Prints changes of stages and every step until the run ends."""
    from pipeline.reports.report import StepLines

    states: dict[str, str] = {}
    steps: dict[str, StepLines] = {}
    shown: dict[str, int] = {}
    while True:
        record = find_run(record.folder, Path())  # before reading, so that no last line is missed
        for name, folder in stage_folders(record).items():
            stage = record.stages[name]
            if name not in states and stage.state not in (State.RUNNING, State.WAITING):
                shown[name] = len(read_metrics(folder))  # over before this command began
            if states.get(name) != stage.state:
                states[name] = stage.state
                OUT.print(Text(f"{name}: {stage.state}"))
            lines = steps.setdefault(name, StepLines(_total_steps(folder), OUT.width))
            for row in (rows := read_metrics(folder))[shown.get(name, 0) :]:
                values = {key: value for key, value in row.items() if key != "step"}
                for line in lines.lines(int(row["step"]), values):
                    OUT.print(line, soft_wrap=True)
            shown[name] = len(rows)
        if record.state != State.RUNNING:
            return record
        time.sleep(_SECONDS)


def _view(record: RunRecord) -> Iterator[Text]:
    took = duration((record.ended or time.time()) - record.started)
    yield Text(record.name, style="bold").append(f"  {record.state}, {took}", style="not bold")
    yield Text("  ").join(
        Text(f"{name} {stage.state}", style="" if stage.state == State.RUNNING else "dim")
        for name, stage in record.stages.items()
    )
    folders = stage_folders(record)
    running = [name for name, stage in record.stages.items() if stage.state == State.RUNNING]
    for name in running or [name for name, folder in folders.items() if (folder / METRICS).is_file()][-1:]:
        yield Text()
        yield from _stage_view(name, folders[name])


def _stage_view(name: str, folder: Path) -> Iterator[Text]:
    from pipeline.reports.charts import LineChart, sparkline
    from pipeline.reports.curves import STEP_SECONDS, headline_series, seconds_by_phase, start_and_end
    from pipeline.reports.samples import rollout_files

    rows, total = read_metrics(folder), _total_steps(folder)
    if not rows:
        yield Text(name, style="bold").append("  no step yet", style="not bold")
        return
    step = int(rows[-1]["step"])
    title = Text(name, style="bold").append(f"  step {step}" + (f"/{total}" if total else ""), style="not bold")
    if seconds := [row[STEP_SECONDS] for row in rows[-_PACE_STEPS:] if STEP_SECONDS in row]:
        left = f", {duration(fmean(seconds) * (total - step))} left" if total > step else ""
        title.append(f", {rows[-1].get(STEP_SECONDS, seconds[-1]):.3g} s a step{left}", style="not bold")
    yield title
    series = dict(list(headline_series(rows).items())[:_CURVES])
    width = max(map(len, series), default=0)
    for figure, points in series.items():
        first, last = start_and_end(points)
        spark = max(OUT.width - width - 26, 8)
        curve = sparkline(points, LineChart(figure, "", {figure: points}, {}), spark_levels(), spark)
        yield Text(f"  {figure:{width}} {curve} " + (f"{last:.4g}" if first is None else f"{first:.4g} -> {last:.4g}"))
    took = {phase: seconds for phase, seconds in seconds_by_phase(rows[-1:]).items() if seconds >= 0.001}
    phases = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in took.items())
    yield Text(f"  seconds of step {step}: {phases}")
    files = rollout_files(folder)
    if files:
        yield Text(f"  samples of step {max(files)}", style="dim")
        for sample in read_json_lines(files[max(files)])[:_SAMPLES]:
            reward = "left out" if sample["reward"] is None else f"{sample['reward']:.3g}"
            start = f"  {reward:>8}  {one_line(sample['prompt'], OUT.width // 3)} -> "
            yield Text(start + one_line(sample["completion"], max(OUT.width - len(start) - 1, 10), tail=8))


def _total_steps(folder: Path) -> int:
    """Steps of a stage; 0 where they follow from its data."""
    return int((read_json_or_none(folder / CONFIG) or {}).get("steps") or 0)
