"""The conductor of a run: starts every stage whose inputs are done as a Ray job, and waits for all of them.

It is a process of its own that outlives the terminal. On one machine it has a session and a Ray cluster of its own; on
a cluster it is a Ray job. It keeps its state in the run's folder, where every shell can read it and where the next
conductor continues.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

from ray.job_submission import JobStatus
from rich.console import Console

from configs.environment import variables_of
from configs.graph import cut_off, graph, ready
from configs.visible import visible
from jobs.command import begin_anew, exit_code, explain, plain_table, quieten
from jobs.machine import stopped_processes
from jobs.order import ORDER, Order
from jobs.stage_job import RESULT_FILE, StageResult, copy_results
from jobs.submission import Jobs, cluster_with_jobs, job_id, stage_command
from pipeline.cluster.actors import Node, describe_nodes
from pipeline.cluster.demand import Demand, stage_demand
from pipeline.cluster.machine import refuse_here
from pipeline.cluster.room import lost_processes, ray_processes
from pipeline.disk.ending import Ending
from pipeline.disk.files import write_atomic
from pipeline.disk.lock import locked
from pipeline.disk.recorded import read_figures
from pipeline.disk.run_record import CONSOLE, RECIPE, RUN, RunRecord, StageRecord, State, refuse_other_recipe
from pipeline.errors import RunStopped
from pipeline.reports.files import duration

if TYPE_CHECKING:
    from pipeline.run.dry_run import StagePreview

RESULT_POLL_SECONDS, JOB_POLL_SECONDS = 0.1, 2.0
"""Seconds between two reads of the stages' results from disk, and between two requests for the state of their jobs."""
LAST_LOG_SECONDS = 5.0
"""Longest wait for the last lines of a stage's output."""


class Conductor:
    """One run, from its first stage to its last."""

    def __init__(self, order: Order, record: RunRecord, jobs: Jobs, nodes: list[Node]) -> None:
        self._order, self._record, self._jobs, self._nodes = order, record, jobs, nodes
        self._stages = record.stages
        self._graph = graph(order.recipe)
        self._running: list[str] = []
        self._log_threads: dict[str, Thread] = {}
        """The thread that reads the output of each stage that was started."""
        self._prefixed: set[str] = set()
        """Stages whose lines begin with their names, because another stage printed at the same time."""
        self._last_job_poll = time.monotonic()
        self._console = Console(soft_wrap=True)
        self._ray = {} if order.address else ray_processes()
        """Addresses of the processes of this run's own cluster, which don't come back."""
        self._stopped = set[int]()
        """Processes of this run's own cluster that a signal stopped."""

    def run(self) -> Ending:
        """Starts and awaits stages until nothing runs and nothing can start."""
        try:
            while True:
                self._start_ready()
                if not self._running:
                    for thread in self._log_threads.values():
                        thread.join(LAST_LOG_SECONDS)
                    return _finish(self._record)
                self._await_result()
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        is_lost = bool(lost_processes(self._ray))  # then nobody answers, and the stages end with Ray
        survivors = [] if is_lost else self._jobs.stop([self._stages[name].job for name in self._running])
        for name in list(self._running):
            self._record_result(name, StageResult(Ending.INTERRUPTED, "stopped"))
        if survivors:
            self._print(f"did not stop: {', '.join(survivors)}")

    def _in_state(self, state: str) -> list[str]:
        return [name for name, stage in self._stages.items() if stage.state == state]

    def _start_ready(self) -> None:
        """Submits every stage that can start now, in the recipe's order. The others record what they wait for."""
        done_names, waiting_names = self._in_state(Ending.DONE.word), self._in_state(State.WAITING)
        for name in waiting_names:
            missing = [parent for parent in self._graph[name] if parent not in done_names]
            self._stages[name].reason = f"needs {', '.join(missing)}"
        for name in ready(self._graph, waiting_names, done_names):
            stage = self._stages[name]
            in_use = sum(self._demand(other).scarce_resource(self._nodes)[0] for other in self._running)
            needed, capacity = self._demand(name).scarce_resource(self._nodes)
            if self._running and in_use + needed > capacity:
                unit = "GPUs" if any(node.gpus for node in self._nodes) else "cores"
                users = ", ".join(self._running)
                stage.reason = f"asks for {needed:g} of {capacity:g} {unit}; {users} has {in_use:g}"
            else:
                self._submit(name, stage)
        _publish(self._record)

    def _demand(self, name: str) -> Demand:
        return stage_demand(self._order.recipe.stages[name], self._order.recipe)

    def _submit(self, name: str, stage: StageRecord) -> None:
        folder = self._order.folder
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / RESULT_FILE).unlink(missing_ok=True)
        stage.job, stage.state, stage.reason = job_id(self._record.name, name), State.RUNNING, ""
        stage.started, stage.ended, stage.exit_code = time.time(), None, None
        self._running.append(name)  # before it runs, so that a stop in between finds it
        self._jobs.submit(
            stage_command(folder, name, self._order.working_directory),
            job=stage.job,
            run=self._record.name,
            stage=name,
            folder=folder,
            environment=variables_of(self._order.recipe.model_dump_json())
            | {key: os.environ[key] for key in ("COLUMNS",) if key in os.environ},
        )
        thread = Thread(target=self._jobs.follow, args=(stage.job, self._log_writer(name)), daemon=True)
        self._log_threads[name] = thread
        thread.start()

    def _log_writer(self, name: str) -> Callable[[str], None]:
        """A function that writes a stage's output into its folder and the run's log.

        In the log, lines begin with the stage's name from the moment on at which another stage prints as well.
        """

        def write(text: str) -> None:
            with (self._order.folder / name / CONSOLE).open("a", encoding="utf-8") as console:
                console.write(visible(text))
            if sum(thread.is_alive() for thread in self._log_threads.values()) > 1:
                self._prefixed.add(name)
            prefix = f"[{name}] " if name in self._prefixed else ""
            sys.stdout.write("".join(prefix + line for line in visible(text).splitlines(keepends=True)))
            sys.stdout.flush()

        return write

    def _await_result(self) -> None:
        """Waits until at least one stage has ended, and records its result. Raises RunStopped where a process of the
        run's own Ray cluster is lost: Ray itself would end this process after a minute, without a word."""
        while True:
            poll_jobs = time.monotonic() - self._last_job_poll > JOB_POLL_SECONDS
            if poll_jobs:  # before the job server is asked, which waits for what is lost
                if lost := lost_processes(self._ray):
                    raise RunStopped(f"{lost}; the same command resumes the run")
                self._name_stopped()
            results = {name: self._result(name, poll_jobs) for name in self._running}
            for name, result in results.items():
                if result is not None:
                    self._record_result(name, result)
            if any(results.values()):
                return
            if poll_jobs:
                self._last_job_poll = time.monotonic()
            time.sleep(RESULT_POLL_SECONDS)

    def _name_stopped(self) -> None:
        """Names each process of a run of its own cluster that a signal stopped: what waits for it would seem to hang.
        Judging processes are killed and replaced at their limit."""
        stopped = {} if self._order.address else stopped_processes()
        for pid in stopped.keys() - self._stopped:
            self._print(f"process {pid} ({stopped[pid]}) is stopped; `kill -CONT {pid}` lets it go on", style="yellow")
        self._stopped = set(stopped)

    def _result(self, name: str, poll_job: bool) -> StageResult | None:
        """The result of a stage, or None while it runs. A killed stage leaves none on disk: its job's state tells."""
        folder = self._order.folder / name
        result = StageResult.read(folder)
        job = self._jobs.ended(self._stages[name].job) if poll_job and result is None else None
        if job is None:
            return result
        if job.status == JobStatus.STOPPED:
            return StageResult(Ending.INTERRUPTED, "its job was stopped")
        message = (job.message or "").partition(", last available logs")[0]
        # The result may have been written since it was read above.
        return StageResult.read(folder) or StageResult(Ending.FAULT, f"its process ended without a word: {message}")

    def _record_result(self, name: str, result: StageResult) -> None:
        stage = self._stages[name]
        stage.exit_code, stage.ended, stage.reason = int(result.ending), time.time(), result.reason
        stage.state = result.ending.word
        if result.ending != Ending.DONE:
            self._print(f"{name} {stage.state}: {result.reason}", style="red")
            for other, parent in cut_off(self._graph, self._in_state(State.WAITING), [name]).items():
                self._stages[other].state, self._stages[other].reason = (
                    State.NOT_REACHED,
                    f"needs {parent}, {stage.state}",
                )
        self._running.remove(name)
        _publish(self._record)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False)


def _finish(record: RunRecord) -> Ending:
    """The ending of the first stage that failed, since others may have failed because of it."""
    failed = [stage for stage in record.stages.values() if stage.exit_code]
    first = min(failed, key=lambda stage: stage.ended or 0.0, default=None)
    record.reason = "" if first is None else first.reason
    done = sum(stage.state == Ending.DONE.word for stage in record.stages.values())
    Console(soft_wrap=True).print(
        f"{record.name}: {done} of {len(record.stages)} stages done, {duration(time.time() - record.started)} "
        f"({record.folder})",
        markup=False,
        highlight=False,
    )
    return Ending.DONE if first is None else Ending(first.exit_code)


def conduct(order: Order) -> Ending:
    """Runs the order. Raises ValueError for an error that is found before any stage starts."""
    with locked(order.folder, wait_seconds=2.0):
        refuse_other_recipe(order.recipe, order.folder)
        _refuse_here(order)
        earlier = _earlier_record(order.folder)
        earlier_text = (order.folder / RUN).read_text(encoding="utf-8") if earlier is not None else None
        record = order.new_record(earlier)
        record.write()
        imports = Thread(target=import_module, args=("pipeline.run.dry_run",))  # takes seconds, while Ray starts
        imports.start()
        try:
            ending = _reuse(order, record)
            if ending is None:
                with cluster_with_jobs() as address, _signals_raise():
                    imports.join()
                    ending = _conduct(order, record, Jobs(address))
        except (KeyboardInterrupt, SystemExit):  # Ray raises SystemExit for a SIGTERM while it starts
            _close_record(order, record, Ending.INTERRUPTED, "stopped")
            raise KeyboardInterrupt from None
        except Exception as error:
            message, ending = explain(error)
            if ending == Ending.WRONG_INPUT and earlier_text is not None and not _has_started_stages(record):
                write_atomic(order.folder / RUN, earlier_text)  # the refused order changed nothing
            else:
                _close_record(order, record, ending, message)
            raise
        _close_record(order, record, ending, record.reason)
        if ending == Ending.DONE:
            copy_results(order.recipe, order.folder)
        return ending


def _reuse(order: Order, record: RunRecord) -> Ending | None:
    """Ends a run whose stages are all done, without a cluster; None where one must run, and on a cluster that is
    there."""
    if order.address or any(read_figures(order.folder / name) is None for name in order.stages):
        return None
    planned = _plan(order)
    if any(stage.selected and stage.progress != "done" for stage in planned):
        return None
    _begin(order, record, planned, [])
    return _finish(record)


def _conduct(order: Order, record: RunRecord, jobs: Jobs) -> Ending:
    from pipeline.cluster.room import nodes
    from pipeline.cluster.storage import refuse_unshared
    from pipeline.run.dry_run import outdated

    record.address = record.address or jobs.address
    # A conductor that was killed leaves jobs on a cluster that still runs.
    survivors = jobs.stop(jobs.running(order.folder, stages=True))
    if survivors:
        raise ValueError(f"jobs of an earlier run into '{order.folder}' don't stop: {', '.join(survivors)}")
    refuse_unshared(order.folder)
    if order.shipment is not None:
        folder = order.shipment.unpack(Path.cwd(), order.folder)
        os.chdir(folder)
        order = order.model_copy(update={"working_directory": folder})
    planned, cluster_nodes = _plan(order), nodes()
    begin_anew(order.folder / name for name in outdated(planned, order.recipe))
    _begin(order, record, planned, cluster_nodes)
    return Conductor(order, record, jobs, cluster_nodes).run()


def _plan(order: Order) -> list["StagePreview"]:
    """Preview the action of each stage. Raises ValueError for conflicts and missing inputs of the selected ones."""
    from pipeline.run.dry_run import StageSelection, dry_run, refuse_problems

    planned = dry_run(order.recipe, order.folder, StageSelection(order.start, order.until, order.only))
    refuse_problems(planned)
    return planned


def _begin(order: Order, record: RunRecord, planned: list["StagePreview"], nodes: list[Node]) -> None:
    """Records and prints what each stage will do. Raises ValueError for a stage that no node can ever run."""
    for stage in planned:
        stage_record = record.stages[stage.name]
        if stage.progress == "done":
            stage_record.state, stage_record.reused = Ending.DONE.word, True
        elif not stage.selected:
            stage_record.state = State.LEFT_OUT
        elif impossible := stage_demand(stage.config, order.recipe).why_impossible(nodes):
            raise ValueError(f"{stage.name}: {impossible}")
    write_atomic(order.folder / RECIPE, order.recipe.model_dump_json(indent=1))
    record.reason = ""
    _print_plan(record, order, nodes)


def _refuse_here(order: Order) -> None:
    """Raises ValueError for a chosen stage that a cluster of this machine alone can't run."""
    for name in order.stages:
        if read_figures(order.folder / name) is None:
            try:
                refuse_here(order.recipe.stages[name], order.recipe)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _earlier_record(folder: Path) -> RunRecord | None:
    """The record of the run so far, or None if there is none or it is damaged; it is then written anew."""
    if not (folder / RUN).is_file():
        return None
    try:
        return RunRecord.read(folder)
    except ValueError as error:
        Console().print(str(error), style="yellow", markup=False, soft_wrap=True)
        return None


def _has_started_stages(record: RunRecord) -> bool:
    return any(stage.state == State.RUNNING or stage.exit_code is not None for stage in record.stages.values())


def _close_record(order: Order, record: RunRecord, ending: Ending, reason: str) -> None:
    record.state, record.exit_code, record.ended, record.reason = ending.word, int(ending), time.time(), reason
    if not order.job:
        record.address = ""  # its own cluster is gone
    _publish(record)


def _publish(record: RunRecord) -> None:
    """Writes the record for other shells, and the run's report."""
    from pipeline.reports.recipe_page import write_recipe_html

    record.write()
    write_recipe_html(record)


def _print_plan(record: RunRecord, order: Order, nodes: list[Node]) -> None:
    """Prints the stages with their demands, and the cluster."""
    table = plain_table("stage", "", "asks for", "after")
    for name, stage in record.stages.items():
        state = "reused" if stage.reused else stage.state
        table.add_row(
            name, state, str(stage_demand(order.recipe.stages[name], order.recipe)), ", ".join(stage.waits_for)
        )
    console = Console()
    console.print(table)
    cluster = f"cluster: {describe_nodes(nodes)}" if nodes else "nothing to run, so no cluster is started"
    console.print(f"{cluster}; run folder {order.folder}", highlight=False, soft_wrap=True)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """While the block runs, the first SIGTERM or SIGINT raises KeyboardInterrupt; later ones are ignored."""

    def interrupt(number: int, _: object) -> NoReturn:
        for ending_signal in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending_signal, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for ending_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending_signal, interrupt)
    yield


def main() -> int:
    """Runs the order from the environment, and returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # works at once, until Ray's start replaces it
    quieten()
    order = Order.model_validate_json(os.environ.pop(ORDER))
    if order.shipment is None:
        os.chdir(order.working_directory)
    return exit_code(lambda: conduct(order), resumes=True)


if __name__ == "__main__":
    sys.exit(main())
