"""The conductor of a run: starts every stage whose inputs are there as a Ray job, and waits for all of them.

It is a process of its own that outlives the terminal: on this machine one with a session and a Ray cluster of its own,
on a cluster a Ray job. What it knows stands in the run's folder, so that any shell can look and the next can go on.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from ray.job_submission import JobStatus
from rich.console import Console
from rich.table import Table

from configs.base import Settings
from configs.graph import chosen, cut_off, graph, ready
from configs.stages import Recipe
from jobs.command import FAULT, WRONG_INPUT, duration, exit_code, meaning, quieten
from jobs.command import INTERRUPTED as INTERRUPTED_CODE
from jobs.stage_job import Outcome
from jobs.submission import Jobs, cluster_with_jobs, job_id, stage_command
from pipeline.cluster.demand import Demand, Node, describe_nodes, stage_demand
from pipeline.cluster.machine import refuse_here
from pipeline.disk.files import write_atomic
from pipeline.disk.lock import locked
from pipeline.disk.recorded import read_figures
from pipeline.disk.run_record import (
    CONSOLE,
    DONE,
    ENDINGS,
    FAILED,
    LEFT_OUT,
    NOT_REACHED,
    RECIPE,
    RUN,
    RUNNING,
    WAITING,
    RunRecord,
    StageRecord,
    refuse_other_recipe,
)

ORDER = "ALIGNYARD_ORDER"
"""Environment variable with what to run."""
LOOK_SECONDS, ASK_SECONDS = 0.1, 2.0
"""How often the conductor looks for what a stage leaves behind, and asks whether its job still lives."""
LOG_SECONDS = 5.0
"""How long the last lines of a stage may take."""


class Order(Settings):
    """What a conductor is to run."""

    recipe: Recipe
    """The recipe."""
    folder: Path
    """Absolute folder of the run."""
    working_directory: Path
    """Where relative paths of the recipe start from."""
    start: str | None = None
    """The first stage to run (see configs.graph.chosen)."""
    until: str | None = None
    """The last stage to run."""
    only: str | None = None
    """The stage to run alone."""
    address: str = ""
    """Job server of the cluster it runs on, as the user calls it; empty for a cluster of its own."""
    job: str = ""
    """Its own Ray job; empty where it is a process."""


class Conductor:
    """One run, from its first stage to its last."""

    def __init__(self, order: Order, record: RunRecord, jobs: Jobs, nodes: list[Node]) -> None:
        self._order, self._record, self._jobs, self._nodes = order, record, jobs, nodes
        self._graph = graph(order.recipe)
        self._running: list[str] = []
        self._threads: dict[str, Thread] = {}
        """The thread that reads the log of each stage that was started."""
        self._beside_others: set[str] = set()
        """Stages whose lines begin with their names, since others speak at the same time."""
        self._asked = time.monotonic()
        self._console = Console(soft_wrap=True)

    def run(self) -> int:
        """Until nothing runs and nothing can start; the run's exit code."""
        try:
            while True:
                self._start()
                if not self._running:
                    for thread in self._threads.values():
                        thread.join(LOG_SECONDS)
                    return self._end()
                self._collect()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends what runs."""
        left = self._jobs.stop([self._stages[name].job for name in self._running])
        for name in list(self._running):
            self._ended(name, Outcome(INTERRUPTED_CODE, "stopped"))
        if left:
            self._say(f"did not stop: {', '.join(left)}")

    @property
    def _stages(self) -> dict[str, StageRecord]:
        return self._record.stages

    def _named(self, *states: str) -> list[str]:
        return [name for name, stage in self._stages.items() if stage.state in states]

    def _start(self) -> None:
        """Submits every stage that can start now, in the recipe's order; the others are told what they wait for."""
        done, waiting = self._named(DONE), self._named(WAITING)
        for name in waiting:
            missing = [parent for parent in self._graph[name] if parent not in done]
            self._stages[name].reason = f"needs {', '.join(missing)}"
        for name in ready(self._graph, waiting, done):
            stage = self._stages[name]
            taken = sum(self._demand(other).scarce_resource(self._nodes)[0] for other in self._running)
            asked, there = self._demand(name).scarce_resource(self._nodes)
            if self._running and taken + asked > there:
                unit = "GPUs" if any(node.gpus for node in self._nodes) else "cores"
                stage.reason = f"asks for {asked:g} of {there:g} {unit}; {', '.join(self._running)} has {taken:g}"
                continue
            self._submit(name, stage)
        _publish(self._record)

    def _demand(self, name: str) -> Demand:
        return stage_demand(self._order.recipe.stages[name], self._order.recipe)

    def _submit(self, name: str, stage: StageRecord) -> None:
        folder = self._order.folder
        Outcome.clear(folder / name)
        stage.job, stage.state, stage.reason = job_id(self._record.name, name), RUNNING, ""
        stage.started, stage.ended, stage.exit_code = time.time(), None, None
        command = stage_command(folder, name, self._order.working_directory)
        environment = {name: os.environ[name] for name in ("COLUMNS",) if name in os.environ}
        self._running.append(name)  # before it runs, so that a stop in between finds it
        self._jobs.submit(
            command, job=stage.job, run=self._record.name, stage=name, folder=folder, environment=environment
        )
        self._threads[name] = self._jobs.follow_aside(stage.job, self._teller(name))

    def _teller(self, name: str) -> Any:
        """Writes what a stage says into its folder and the run's log; with its name before each line where another one
        speaks at the same time."""

        def tell(text: str) -> None:
            with (self._order.folder / name / CONSOLE).open("a", encoding="utf-8") as console:
                console.write(text)
            if sum(thread.is_alive() for thread in self._threads.values()) > 1:
                self._beside_others.add(name)
            prefix = f"[{name}] " if name in self._beside_others else ""
            sys.stdout.write("".join(prefix + line for line in text.splitlines(keepends=True)))
            sys.stdout.flush()

        return tell

    def _collect(self) -> None:
        """Waits until a stage has ended."""
        while True:
            ask = time.monotonic() - self._asked > ASK_SECONDS
            ended = {name: outcome for name in self._running if (outcome := self._outcome(name, ask)) is not None}
            for name, outcome in ended.items():
                self._ended(name, outcome)
            if ended:
                return
            if ask:
                self._asked = time.monotonic()
            time.sleep(LOOK_SECONDS)

    def _outcome(self, name: str, ask: bool) -> Outcome | None:
        """How a stage ended; None while it runs. It says so itself, unless it is killed: then Ray knows, if asked."""
        folder = self._order.folder / name
        outcome = Outcome.read(folder)
        job = self._jobs.ended(self._stages[name].job) if ask and outcome is None else None
        if job is None:
            return outcome
        if job.status == JobStatus.STOPPED:
            return Outcome(INTERRUPTED_CODE, "its job was stopped")
        words = (job.message or "").partition(", last available logs")[0]
        return Outcome.read(folder) or Outcome(FAULT, f"its process ended without a word: {words}")  # written since

    def _ended(self, name: str, outcome: Outcome) -> None:
        stage = self._stages[name]
        stage.exit_code, stage.ended, stage.reason = outcome.exit_code, time.time(), outcome.reason
        stage.state = ENDINGS.get(outcome.exit_code, FAILED)
        if outcome.exit_code:
            self._say(f"{name} {stage.state}: {outcome.reason}", style="red")
            for other, lost in cut_off(self._graph, self._named(WAITING), [name]).items():
                self._stages[other].state, self._stages[other].reason = NOT_REACHED, f"needs {lost}, {stage.state}"
        self._running.remove(name)
        _publish(self._record)

    def _end(self) -> int:
        """The code of the first stage that ended badly, since others may have ended so because of it."""
        bad = [stage for stage in self._stages.values() if stage.exit_code]
        first = min(bad, key=lambda stage: stage.ended or 0.0, default=None)
        self._record.reason = "" if first is None else first.reason
        took = duration(time.time() - self._record.started)
        done = self._named(DONE)
        self._say(
            f"{self._record.name}: {len(done)} of {len(self._stages)} stages done, {took} ({self._record.folder})"
        )
        return 0 if first is None else first.exit_code or FAULT

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False)


def conduct(order: Order) -> int:
    """Runs the order; the exit code. Raises ValueError for what is wrong before anything starts."""
    with locked(order.folder, wait_seconds=2.0):
        refuse_other_recipe(order.recipe, order.folder)
        _refuse_here(order)
        earlier = _earlier(order.folder)
        before = (order.folder / RUN).read_text(encoding="utf-8") if earlier is not None else None
        record = _record(order, earlier)
        record.write()
        # What takes seconds to import is imported while Ray starts.
        imports = Thread(target=import_module, args=("pipeline.run.dry_run",))
        imports.start()
        try:
            with cluster_with_jobs() as address, _signals_raise():
                imports.join()
                code = _conduct(order, record, Jobs(address))
        except (KeyboardInterrupt, SystemExit):  # while it starts, Ray answers SIGTERM in its own way
            _finish(order, record, INTERRUPTED_CODE, "stopped")
            raise KeyboardInterrupt from None
        except Exception as error:
            message, code = meaning(error)
            if code == WRONG_INPUT and before is not None and not _started(record):
                write_atomic(order.folder / RUN, before)  # the refused order changed nothing
            else:
                _finish(order, record, code, message)
            raise
        _finish(order, record, code, record.reason)
        return code


def _conduct(order: Order, record: RunRecord, jobs: Jobs) -> int:
    from pipeline.cluster.room import nodes
    from pipeline.run.dry_run import StageSelection, dry_run, refuse_problems

    record.address = record.address or jobs.address
    # A conductor that was killed leaves jobs on a cluster that still runs.
    left = jobs.stop(jobs.running(order.folder, stages=True))
    if left:
        raise ValueError(f"jobs of an earlier run into '{order.folder}' don't stop: {', '.join(left)}")
    planned, there = dry_run(order.recipe, order.folder, StageSelection(order.start, order.until, order.only)), nodes()
    refuse_problems(planned)
    for stage in planned:
        own = record.stages[stage.name]
        if stage.progress == "done":
            own.state, own.reused = DONE, True
        elif not stage.selected:
            own.state = LEFT_OUT
        elif never := stage_demand(stage.config, order.recipe).why_impossible(there):
            raise ValueError(f"{stage.name}: {never}")
    write_atomic(order.folder / RECIPE, order.recipe.model_dump_json(indent=1))
    record.reason = ""
    _show(record, order, there)
    return Conductor(order, record, jobs, there).run()


def _refuse_here(order: Order) -> None:
    """Raises ValueError for a stage that is to run and that this machine, where the cluster is to be, can't run."""
    stages = graph(order.recipe)
    for name in chosen(stages, start=order.start, until=order.until, only=order.only):
        if read_figures(order.folder / name) is None:
            try:
                refuse_here(order.recipe.stages[name], order.recipe)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _earlier(folder: Path) -> RunRecord | None:
    """The record of the run so far; None where there is none that can be read, which is then written anew."""
    if not (folder / RUN).is_file():
        return None
    try:
        return RunRecord.read(folder)
    except ValueError as error:
        Console().print(str(error), style="yellow", markup=False, soft_wrap=True)
        return None


def _record(order: Order, earlier: RunRecord | None) -> RunRecord:
    """A new record; of a stage that ran before it keeps which job that was, and when."""
    stages = {
        name: StageRecord(order.recipe.stages[name].type, waits_for) for name, waits_for in graph(order.recipe).items()
    }
    for name, before in earlier.stages.items() if earlier is not None else ():
        if name in stages:
            stages[name].job, stages[name].started, stages[name].ended = before.job, before.started, before.ended
    record = RunRecord(order.recipe.name, str(order.folder), stages, address=order.address, job=order.job)
    record.reason = "starting"
    return record


def _started(record: RunRecord) -> bool:
    """Whether a stage was started by this conductor."""
    return any(stage.state == RUNNING or stage.exit_code is not None for stage in record.stages.values())


def _finish(order: Order, record: RunRecord, code: int, reason: str = "") -> None:
    record.state, record.exit_code, record.ended = ENDINGS.get(code, FAILED), code, time.time()
    record.reason = reason
    if not order.job:
        record.address = ""  # its cluster is gone
    _publish(record)


def _publish(record: RunRecord) -> None:
    """Makes the state known, to other shells and in the report."""
    from pipeline.reports.recipe_page import write_recipe_html

    record.write()
    write_recipe_html(Path(record.folder))


def _show(record: RunRecord, order: Order, nodes: list[Node]) -> None:
    """What will run, what it asks for, and what there is."""
    table = Table("stage", "", "asks for", "after", box=None, header_style="bold", pad_edge=False)
    for name, stage in record.stages.items():
        state = "reused" if stage.reused else stage.state
        table.add_row(
            name, state, str(stage_demand(order.recipe.stages[name], order.recipe)), ", ".join(stage.waits_for)
        )
    console = Console()
    console.print(table)
    console.print(f"cluster: {describe_nodes(nodes)}; run folder {order.folder}", highlight=False, soft_wrap=True)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT raise KeyboardInterrupt, once."""

    def interrupt(number: int, _: object) -> NoReturn:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, interrupt)
    yield


def main() -> int:
    """Runs the order that stands in the environment."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # from the first moment on; Ray's start overwrites it
    quieten()
    order = Order.model_validate_json(os.environ.pop(ORDER))
    if order.working_directory.is_dir():
        os.chdir(order.working_directory)
    return exit_code(lambda: conduct(order), resumes=True)


if __name__ == "__main__":
    sys.exit(main())
