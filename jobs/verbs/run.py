"""Runs, started: `alignyard run` and `alignyard submit`."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, BinaryIO

from rich.table import Table
from rich.text import Text

from jobs.command import FAULT, OUT, UNREAD, Verbs, add_overrides, add_verb

if TYPE_CHECKING:
    from configs.stages import Recipe
    from jobs.conductor import Order

RUN = """\
Runs a recipe: every stage as a Ray job, as soon as what it refers to is done, side by side where there is room. What is
done already is reused. A run that was stopped or killed goes on where it was when the same command is given again.

Without an address the run has a Ray cluster of its own on this machine, which ends with it; it goes on when the
terminal is closed, and Ctrl-C stops it. With --address (or RAY_ADDRESS) everything runs on that cluster, which has
alignyard installed and, below <runs_dir>, a file system that its machines share. status, logs and stop work from any
shell.

examples:
  alignyard run demo
  alignyard run demo --dry-run
  alignyard run my.yaml stages.reason.steps=300 name=longer
  alignyard run my.yaml --from reason --address http://head:8265 --detach
"""
SUBMIT = """\
Runs one stage as a Ray job and returns at once; otherwise it is as `alignyard run` is.

examples:
  alignyard submit sft my_sft.yaml
  alignyard submit grpo my_grpo.yaml optimizer.learning_rate=1e-5 --output runs/slow --address http://head:8265
"""


def add_run(verbs: Verbs) -> None:
    """Adds `run` and `submit`."""
    run = add_verb(verbs, "run", _run, "run a recipe, every stage as a Ray job", RUN, resumes=True)
    run.add_argument("file", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    add_overrides(run)
    run.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and what follows from it")
    run.add_argument("--until", metavar="STAGE", help="run this stage and what it needs")
    run.add_argument("--only", metavar="STAGE", help="run this stage alone")
    run.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    run.add_argument("--detach", action="store_true", help="return as soon as it has started")
    submit = add_verb(verbs, "submit", _submit, "run one stage as a Ray job", SUBMIT)
    submit.add_argument("stage", metavar="STAGE", help="its type, as docs/recipes.md lists them")
    submit.add_argument("file", metavar="CONFIG", help="a YAML file with the stage's type and keys at the root")
    add_overrides(submit)
    submit.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: runs/<CONFIG's name>)")
    for parser in (run, submit):
        add_address(parser)


def add_address(parser: argparse.ArgumentParser) -> None:
    """`--address`."""
    parser.add_argument("--address", metavar="URL", help="job server of a Ray cluster, as in http://head:8265")


def address_of(args: argparse.Namespace) -> str:
    """The cluster that the command line or RAY_ADDRESS names; empty where neither does."""
    return args.address or os.environ.get("RAY_ADDRESS", "")


def _run(args: argparse.Namespace) -> int:
    from configs.graph import chosen, graph
    from configs.load import load_config
    from configs.stages import Recipe

    recipe = load_config(args.file, args.overrides, Recipe).config
    chosen(graph(recipe), start=args.start, until=args.until, only=args.only)  # a wrong name is told at once
    if args.dry_run:
        return _dry_run(recipe, args)
    order = _order(recipe, address_of(args), start=args.start, until=args.until, only=args.only)
    return _begin(order, detach=args.detach)


def _submit(args: argparse.Namespace) -> int:
    from configs.base import neighbour
    from configs.load import load_config
    from configs.stages import STAGES, Recipe

    if args.stage not in STAGES:
        raise ValueError(f"submit {args.stage}: no such type of stage; {neighbour(args.stage, list(STAGES))}")
    config = load_config(args.file, args.overrides, STAGES[args.stage]).config
    output: Path = args.output or Path("runs") / Path(args.file).stem
    recipe = Recipe.model_validate(
        {"name": output.name, "runs_dir": str(output.parent), "stages": {args.stage: config}}
    )
    return _begin(_order(recipe, address_of(args)), detach=True)


def _order(recipe: "Recipe", address: str, **choice: str | None) -> "Order":
    from jobs.conductor import Order
    from jobs.submission import job_id

    folder = Path(recipe.runs_dir, recipe.name).absolute()
    job = job_id(recipe.name, "") if address else ""
    return Order(recipe=recipe, folder=folder, working_directory=Path.cwd(), address=address, job=job, **choice)


def _begin(order: "Order", *, detach: bool) -> int:
    if order.address:
        return _on_cluster(order, detach)
    return _here(order, detach)


def _on_cluster(order: "Order", detach: bool) -> int:
    from jobs.conductor import ORDER
    from jobs.submission import Jobs, module_command
    from pipeline.disk.lock import holder

    jobs = Jobs(order.address)
    writer = next((f"Ray job {job}" for job in jobs.running(order.folder, stages=False)), holder(order.folder))
    if writer:
        raise ValueError(
            f"'{order.folder}' is being written by {writer}; wait for it, or end it by `alignyard stop "
            f"{order.recipe.name} --address {order.address}`"
        )
    environment = {ORDER: order.model_dump_json(), "COLUMNS": str(OUT.width)}
    command = module_command("jobs.conductor")
    jobs.submit(command, job=order.job, run=order.recipe.name, folder=order.folder, environment=environment)
    if detach:
        return _tell_started(order)
    try:
        jobs.follow(order.job, write)
        while (job := jobs.ended(order.job)) is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        jobs.stop([order.job])
        raise
    return FAULT if job.driver_exit_code is None else job.driver_exit_code


def _here(order: "Order", detach: bool) -> int:
    from jobs.conductor import ORDER
    from pipeline.disk.run_record import LOG

    file = order.folder / LOG
    with _log(file) as log:
        end = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jobs.conductor"],
            env=os.environ | {ORDER: order.model_dump_json(), "COLUMNS": str(OUT.width)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # closing the terminal ends the terminal's session, not this one
        )
    if detach:
        while process.poll() is None and not _under_way(order.folder, process.pid):
            time.sleep(0.1)
        if process.returncode:  # refused at once, or it failed to start: it has said why
            follow(file, end, lambda: True)
            return process.returncode
        return _tell_started(order)
    try:
        follow(file, end, lambda: process.poll() is not None)
    except KeyboardInterrupt:
        process.send_signal(SIGTERM)
        follow(file, file.stat().st_size, lambda: process.poll() is not None)
    return process.wait()


def _log(file: Path) -> BinaryIO:
    """The run's log, opened for appending. Raises ValueError where it can't be written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("ab")
    except OSError as error:
        raise ValueError(
            f"'{file.parent}' can't be written to ({error.strerror}); say by runs_dir=DIR where runs are kept"
        ) from error


def _under_way(folder: Path, pid: int) -> bool:
    """Whether the conductor has found nothing wrong, and starts stages."""
    from pipeline.disk.run_record import RUN, RunRecord

    if not (folder / RUN).is_file():
        return False
    record = RunRecord.read(folder)
    return record.pid == pid and record.reason != "starting"


def follow(file: Path, offset: int, ended: Callable[[], bool]) -> None:
    """Writes what stands in `file` from `offset` on, and what is added, until it has ended."""
    with file.open("r", encoding="utf-8", errors="replace") as log:
        log.seek(offset)
        while True:
            last = ended()
            text = log.read()
            write(text)
            if last and not text:
                return
            if not text:
                time.sleep(0.1)


def write(text: str) -> None:
    """Writes the output of another process unchanged. Ends this one where the reader has closed the pipe."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest once more as it ends
        raise SystemExit(UNREAD) from None


def _tell_started(order: "Order") -> int:
    where = f" --address {order.address}" if order.address else ""
    runs = f" --runs-dir {order.recipe.runs_dir}" if not where and order.recipe.runs_dir != "runs" else ""
    OUT.print(f"started {order.recipe.name} ({order.folder})", highlight=False, soft_wrap=True)
    for verb in ("status", "logs -f", "stop"):
        OUT.print(f"  alignyard {verb} {order.recipe.name}{where}{runs}", highlight=False, soft_wrap=True)
    return 0


def _dry_run(recipe: "Recipe", args: argparse.Namespace) -> int:
    from pipeline.disk.run_record import refuse_other_recipe
    from pipeline.run.dry_run import (
        StageSelection,
        describe_layout,
        describe_model,
        describe_sources,
        dry_run,
        refuse_problems,
    )

    folder = Path(recipe.runs_dir, recipe.name)
    refuse_other_recipe(recipe, folder)
    stages = dry_run(recipe, folder, StageSelection(args.start, args.until, args.only))
    for stage in stages:
        OUT.print(f"\n[bold]{stage.name}[/] ({stage.config.type}): {stage.action}", highlight=False)
        table = Table.grid(padding=(0, 2, 0, 2))
        for title, told in (
            ("after", ", ".join(stage.waits_for)),
            ("model", describe_model(stage.config, recipe)),
            ("layout", "; ".join(describe_layout(stage.config, recipe))),
            ("data", "\n".join(describe_sources(stage.config))),
        ):
            if told:
                table.add_row(title, Text(told))
        if stage.missing_input:
            table.add_row("lacks", Text(stage.missing_input, style="yellow"))
        OUT.print(table)
    OUT.print(f"\nrun folder: {folder}", highlight=False, soft_wrap=True)
    lacking = [stage.name for stage in stages if stage.missing_input]
    if lacking:
        OUT.print(f"before it can run here: what {', '.join(lacking)} lack", style="yellow", soft_wrap=True)
    refuse_problems([stage for stage in stages if stage.conflict])
    return 0
