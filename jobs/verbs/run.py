"""`alignyard run` and `alignyard submit`: start a run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from jobs.command import OUT, Address, Fresh, Output, Overrides, RecipeFile, StageFile, begin_anew, verb_app, write_json
from pipeline.disk.ending import Ending

if TYPE_CHECKING:
    from configs.stages import Recipe
    from jobs.conductor import Order
    from pipeline.run.preview_placement import PlacementPreview

app = verb_app()


@app.command()
def run(
    file: RecipeFile,
    overrides: Overrides,
    start: Annotated[str | None, Option("--from", metavar="STAGE", help="Run this stage and its dependents.")] = None,
    until: Annotated[str | None, Option(metavar="STAGE", help="Run this stage and its dependencies.")] = None,
    only: Annotated[str | None, Option(metavar="STAGE", help="Run this stage alone.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan of the run, and start nothing.")] = False,
    cluster: Annotated[
        str, Option(metavar="NxDEVICE", help="With --dry-run: place every stage on this cluster, such as 1x8xH100.")
    ] = "",
    json_file: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write those placements to a file.")
    ] = None,
    detach: Annotated[bool, Option("--detach", help="Return as soon as the run has started.")] = False,
    fresh: Fresh = False,
    address: Address = "",
) -> int:
    """Run a recipe: every stage as a Ray job, as soon as its inputs are done, in parallel where resources allow.

    Finished stages are reused. An interrupted run continues when the same command is given again.

    Without an address the run starts its own Ray cluster on this machine, which ends with it. It goes on when the
    terminal closes; Ctrl-C stops it. With --address (or RAY_ADDRESS) everything runs on that cluster: its machines
    need alignyard installed and must share the file system of <runs_dir>. status, logs and stop work from any shell.

    \b
    Examples:
      alignyard run demo
      alignyard run demo --dry-run
      alignyard run deepseek_v2_lite --dry-run --cluster 1x8xH100 --json placement.json
      alignyard run my.yaml stages.reason.steps=300 name=longer
      alignyard run my.yaml --from reason --fresh
      alignyard run my.yaml --from reason --address http://head:8265 --detach
    """
    from configs.graph import chosen, graph
    from configs.load import load_config
    from configs.stages import Recipe

    recipe = load_config(file, overrides, Recipe).config
    selection = {"start": start, "until": until, "only": only}
    names = chosen(graph(recipe), **selection)  # refuses a wrong stage name at once
    if fresh and dry_run:
        raise ValueError("--fresh moves results aside, and --dry-run changes nothing; give one of them")
    if (cluster and not dry_run) or (json_file and not cluster):
        raise ValueError("--cluster goes with --dry-run, and --json with --cluster")
    if dry_run:
        return _dry_run(recipe, selection, cluster, json_file)
    if fresh:
        folder = Path(recipe.runs_dir, recipe.name)
        begin_anew((folder / name for name in names), run=folder)
    return _start(_order(recipe, address, **selection), detach=detach)


@app.command()
def submit(
    stage: Annotated[str, Argument(metavar="STAGE", help="Its type; docs/recipes.md lists the types.")],
    file: StageFile,
    overrides: Overrides,
    output: Output = None,
    address: Address = "",
) -> int:
    """Run one stage as a Ray job, and return at once. Everything else is as with `alignyard run`.

    \b
    Examples:
      alignyard submit sft my_sft.yaml
      alignyard submit grpo my_grpo.yaml optimizer.learning_rate=1e-5 --output runs/slow --address http://head:8265
    """
    from configs.base import neighbour
    from configs.load import load_config
    from configs.stages import STAGES, Recipe

    if stage not in STAGES:
        raise ValueError(f"submit {stage}: no such type of stage; {neighbour(stage, list(STAGES))}")
    config = load_config(file, overrides, STAGES[stage]).config
    folder = output or Path("runs") / Path(file).stem
    recipe = Recipe.model_validate({"name": folder.name, "runs_dir": str(folder.parent), "stages": {stage: config}})
    return _start(_order(recipe, address), detach=True)


def _order(recipe: "Recipe", address: str, **selection: str | None) -> "Order":
    from jobs.conductor import Order
    from jobs.submission import job_id

    folder = Path(recipe.runs_dir, recipe.name).absolute()
    job = job_id(recipe.name, "") if address else ""
    return Order(recipe=recipe, folder=folder, working_directory=Path.cwd(), address=address, job=job, **selection)


def _start(order: "Order", *, detach: bool) -> int:
    return _run_on_cluster(order, detach) if order.address else _run_here(order, detach)


def _run_on_cluster(order: "Order", detach: bool) -> int:
    """Starts the conductor as a Ray job, and follows its output."""
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
        return _print_started(order)
    try:
        jobs.follow(order.job, write)
        while (details := jobs.ended(order.job)) is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        jobs.stop([order.job])
        raise
    return Ending.FAULT if details.driver_exit_code is None else details.driver_exit_code


def _run_here(order: "Order", detach: bool) -> int:
    """Starts the conductor as a process of this machine, and follows its log."""
    from jobs.conductor import ORDER
    from pipeline.disk.run_record import LOG

    file = order.folder / LOG
    with _open_log(file) as log:
        offset = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jobs.conductor"],
            env=os.environ | {ORDER: order.model_dump_json(), "COLUMNS": str(OUT.width)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that closing the terminal does not end it
        )
    if detach:
        while process.poll() is None and not _has_started(order.folder, process.pid):
            time.sleep(0.1)
        if process.returncode:  # it refused the order or failed to start; its log has the reason
            follow(file, offset, lambda: True)
            return process.returncode
        return _print_started(order)
    try:
        follow(file, offset, lambda: process.poll() is not None)
    except KeyboardInterrupt:
        process.send_signal(SIGTERM)
        follow(file, file.stat().st_size, lambda: process.poll() is not None)
    return process.wait()


def _open_log(file: Path) -> BinaryIO:
    """Opens the run's log for appending. Raises ValueError if it is not writable."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("ab")
    except OSError as error:
        raise ValueError(
            f"'{file.parent}' can't be written to ({error.strerror}); set runs_dir=DIR to a folder that can"
        ) from error


def _has_started(folder: Path, pid: int) -> bool:
    """True once the conductor has accepted its order and starts stages."""
    from pipeline.disk.run_record import RUN, RunRecord

    if not (folder / RUN).is_file():
        return False
    record = RunRecord.read(folder)
    return record.pid == pid and record.reason != "starting"


def follow(file: Path, offset: int, ended: Callable[[], bool]) -> None:
    """Prints `file` from `offset` on, and whatever is appended until `ended()`."""
    with file.open("r", encoding="utf-8", errors="replace") as log:
        log.seek(offset)
        while True:
            last = ended()  # before reading, so that no last line is missed
            text = log.read()
            write(text)
            if last and not text:
                return
            if not text:
                time.sleep(0.1)


def write(text: str) -> None:
    """Prints the output of another process unchanged. Ends this process if the reader has closed the pipe."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it exits
        raise SystemExit(Ending.OUTPUT_CLOSED) from None


def _print_started(order: "Order") -> int:
    options = f" --address {order.address}" if order.address else ""
    if not order.address and order.recipe.runs_dir != "runs":
        options = f" --runs-dir {order.recipe.runs_dir}"
    OUT.print(f"started {order.recipe.name} ({order.folder})", highlight=False, soft_wrap=True)
    for verb in ("status", "logs -f", "stop"):
        OUT.print(f"  alignyard {verb} {order.recipe.name}{options}", highlight=False, soft_wrap=True)
    return 0


def _dry_run(recipe: "Recipe", selection: dict[str, str | None], cluster: str, json_file: Path | None) -> int:
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
    previews = _placements(recipe, cluster) if cluster else {}
    stages = dry_run(recipe, folder, StageSelection(**selection))
    for stage in stages:
        OUT.print(f"\n[bold]{stage.name}[/] ({stage.config.type}): {stage.action}", highlight=False)
        table = Table.grid(padding=(0, 2, 0, 2))
        for title, text in (
            ("after", ", ".join(stage.waits_for)),
            ("model", describe_model(stage.config, recipe)),
            ("layout", "; ".join(describe_layout(stage.config, recipe))),
            ("data", "\n".join(describe_sources(stage.config))),
        ):
            if text:
                table.add_row(title, Text(text))
        if stage.missing_input:
            table.add_row("lacks", Text(stage.missing_input, style="yellow"))
        OUT.print(table)
        if stage.name in previews:
            _print_placement(previews[stage.name])
    OUT.print(f"\nrun folder: {folder}", highlight=False, soft_wrap=True)
    lacking = [stage.name for stage in stages if stage.missing_input]
    if lacking:
        OUT.print(f"missing before it can run here: the inputs of {', '.join(lacking)}", style="yellow", soft_wrap=True)
    write_json(
        {"cluster": cluster, "stages": {name: _values(preview) for name, preview in previews.items()}}, json_file
    )
    refused = [f"{name}: {preview.refused}" for name, preview in previews.items() if preview.refused]
    if refused:
        raise ValueError("\n".join(refused))
    refuse_problems([stage for stage in stages if stage.conflict])
    return 0


def _placements(recipe: "Recipe", cluster: str) -> "dict[str, PlacementPreview]":
    from pipeline.planner.devices import cluster_of
    from pipeline.run.preview_placement import preview_placement

    devices = cluster_of(cluster)
    return {name: preview_placement(config, recipe, devices) for name, config in recipe.stages.items()}


def _print_placement(preview: "PlacementPreview") -> None:
    """Print the actors of every device, and the GiB that it holds in each phase."""
    from pipeline.cluster.placement import held_bytes

    if preview.placement is None:
        OUT.print(f"  can't be placed: {preview.refused}", style="red", markup=False, highlight=False, soft_wrap=True)
        return
    phases = list(dict.fromkeys(phase for actor in preview.placement.actors for phase in actor.bytes))
    table = Table("device", "actors", *(f"{phase}, GiB" for phase in phases))
    for (node, number), actors in preview.placement.users().items():
        shares = [f"{actor} ({actor.share:g})" if actor.share < 1 else str(actor) for actor in actors]
        held = (f"{held_bytes(actors, phase) / 2**30:.1f}" for phase in phases)
        table.add_row(f"{node}:{number}", ", ".join(shares), *held)
    OUT.print(table, highlight=False)
    if preview.note:
        OUT.print(f"  {preview.note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _values(preview: "PlacementPreview") -> dict[str, Any]:
    actors = preview.placement.actors if preview.placement else []
    return {"actors": [asdict(actor) for actor in actors], "refused": preview.refused, "note": preview.note}
