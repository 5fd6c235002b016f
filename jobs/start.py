"""Start a run: its configuration, its order, the conductor that carries it out, and the output of that process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGTERM, Signals
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO

from configs.visible import visible
from jobs.command import OUT, print_error
from pipeline.disk.ending import Ending

if TYPE_CHECKING:
    from configs.evaluation import EvalConfig
    from configs.load import LoadedConfig
    from configs.stages import AnyStage, Recipe
    from jobs.order import Order


def load_any(file: str, overrides: Sequence[str]) -> "LoadedConfig[Recipe] | LoadedConfig[AnyStage]":
    """Loads a recipe or, where the file has a `type`, the configuration of one stage. Raises ValueError as
    configs.load.load_config."""
    from configs.load import find_config, load_config, read_yaml
    from configs.stages import STAGES, Recipe

    stage = read_yaml(find_config(file)).get("type")
    return load_config(file, overrides, STAGES.get(str(stage), Recipe))  # pyright: ignore[reportReturnType]


def recipe_of(config: "AnyStage", folder: Path) -> "Recipe":
    """A recipe whose run, in `folder`, is this stage alone."""
    from configs.stages import Recipe

    stages = {config.type: config}
    return Recipe.model_validate({"name": folder.name, "runs_dir": str(folder.parent), "stages": stages})


def evaluation_of(checkpoint: str, suite: str, overrides: Sequence[str]) -> "tuple[EvalConfig, Path]":
    """The evaluation of a checkpoint by the suites of a file, and the folder of its results below runs/."""
    from configs.evaluation import EvalConfig
    from configs.load import load_config

    # A running stage may replace its checkpoint folder meanwhile: evaluate the present one, behind any link.
    path = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    config = load_config(suite, [f"model.path={json.dumps(path)}", *overrides], EvalConfig).config
    # All checkpoints end in the same few folder names, so the run is named for the last three.
    return config, Path("runs", "-".join([Path(suite).stem, *Path(path).resolve().parts[1:][-3:]]))


def new_order(recipe: "Recipe", address: str, **selection: str | None) -> "Order":
    """The order to run a recipe, from this folder, on the cluster at `address` or one of its own; `selection` is that
    of configs.graph.chosen."""
    from jobs.order import Order

    folder = Path(recipe.runs_dir, recipe.name).absolute()
    order = Order(recipe=recipe, folder=folder, working_directory=Path.cwd(), address=address)
    return order.model_copy(update=selection)


def start_order(order: "Order", *, detach: bool) -> int:
    """Starts a run's conductor and follows its output to the end; with `detach` only until it starts stages. Returns
    its exit code."""
    return _run_on_cluster(order, detach) if order.address else _run_here(order, detach)


def _run_on_cluster(order: "Order", detach: bool) -> int:
    """Starts the conductor as a Ray job, and follows its output."""
    from configs.environment import variables_of
    from jobs.order import ORDER
    from jobs.shipment import pack_files
    from jobs.submission import Jobs, job_id, module_command
    from pipeline.disk.lock import holder

    jobs = Jobs(order.address)
    writer = next((f"Ray job {job}" for job in jobs.running(order.folder, stages=False)), holder(order.folder))
    if writer:
        raise ValueError(
            f"'{order.folder}' is being written by {writer}; wait for it, or end it by `alignyard stop "
            f"{order.recipe.name} --address {order.address}`"
        )
    with TemporaryDirectory(prefix="alignyard-") as package:
        shipment, job = pack_files(order.recipe, Path(package)), job_id(order.recipe.name, "")
        order = order.model_copy(update={"shipment": shipment, "job": job})
        text = order.model_dump_json()
        jobs.submit(
            module_command("jobs.conductor"),
            job=order.job,
            run=order.recipe.name,
            folder=order.folder,
            environment=variables_of(text) | {ORDER: text, "COLUMNS": str(OUT.width)},
            package=Path(package),
        )
    if detach:
        return _print_started(order)
    try:
        jobs.follow(order.job, write)
        while (details := jobs.ended(order.job)) is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        jobs.stop([order.job])
        raise
    if details.driver_exit_code is None:
        _print_killed(f"Ray job {order.job}", f"({details.message})")
        return Ending.FAULT
    return details.driver_exit_code


def _run_here(order: "Order", detach: bool) -> int:
    """Starts the conductor as a process of this machine, and follows its log."""
    from jobs.order import ORDER
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
        if process.returncode is not None:  # it refused the order, failed to start or had nothing to run: see its log
            follow(file, offset, lambda: True)
            return _exit_code(process, order)
        return _print_started(order)
    try:
        follow(file, offset, lambda: process.poll() is not None)
    except KeyboardInterrupt:
        process.send_signal(SIGTERM)
        follow(file, file.stat().st_size, lambda: process.poll() is not None)
    return _exit_code(process, order)


def _exit_code(process: "subprocess.Popen[bytes]", order: "Order") -> int:
    """The exit code of the conductor's process, with a message where it was killed and could print none."""
    from pipeline.disk.run_record import RunRecord, State

    code = process.wait()
    is_killed = code < 0
    with suppress(ValueError):  # no record yet, or a damaged one
        record = RunRecord.read(order.folder)
        is_killed |= record.state == State.KILLED and record.pid == process.pid
    if is_killed:
        _print_killed(f"process {process.pid}", f"by {Signals(-code).name}" if code < 0 else f"with exit code {code}")
    return Ending.FAULT if is_killed else code


def _print_killed(conductor: str, ended: str) -> None:
    print_error(
        f"the run's conductor ({conductor}) ended {ended} without a word, as after a kill or a lack of memory; its "
        "stages end with it. The same command resumes the run"
    )


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
    """Prints the output of another process, with control characters escaped. Ends this process if the reader has closed
    the pipe."""
    try:
        sys.stdout.write(visible(text))
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
