"""The faults: how each is injected, and how a run has to end by it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM, Signals

import numpy as np
from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR

from pipeline.disk.ending import Ending
from pipeline.train.checkpoints import saved_states
from tests.faults.run_folder import LIMIT, Run

Injection = Callable[[Run], None]


@dataclass(frozen=True)
class Fault:
    """A fault of the table.

    inject: into a run that trains; into one that was stopped, or not started yet, if `stopped`.
    code: the command's exit code; None where it goes on. says: a pattern of its message. restarts: the stage starts
    again by itself. undo: mends what a user has to mend by hand. own: overrides of a run of its own, which starts from
    the first stage's result. is_apart: its series is not the unharmed run's. needs_root: to be injected.
    """

    name: str
    inject: Injection
    code: Ending | None = None
    says: str = ""
    stopped: bool = False
    restarts: bool = False
    undo: Injection | None = None
    own: tuple[str, ...] | None = None
    is_apart: bool = False
    needs_root: bool = False
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def nothing(_: Run) -> None: ...


def signalled(number: Signals, name: str) -> Injection:
    return lambda run: run.send(number, name)


def killed(name: str, process: str, code: Ending | None = None, says: str = "", *, restarts: bool = False) -> Fault:
    return Fault(f"`kill -9` of {name}", signalled(SIGKILL, process), code, says, restarts=restarts)


def halted(name: str, process: str, code: Ending | None = None, says: str = "", *, goes_on: bool = False) -> Fault:
    """goes_on: by SIGCONT, which a user gives."""
    halt, resume = signalled(SIGSTOP, process), signalled(SIGCONT, process)
    return Fault(f"SIGSTOP of {name}", halt, code, says, undo=resume if goes_on else None)


def newest_state(run: Run) -> Path:
    return saved_states(run.stage)[run.saved_step]


def weights(run: Run) -> Path:
    """The largest file of the newest training state."""
    return max(newest_state(run).glob("rank-*.safetensors"), key=lambda file: file.stat().st_size)


def cut(find: Callable[[Run], Path]) -> Injection:
    def inject(run: Run) -> None:
        file = find(run)
        with file.open("rb+") as stream:
            stream.truncate(file.stat().st_size // 2)

    return inject


def emptied(*names: str) -> Injection:
    return lambda run: print(end="", file=run.folder.joinpath(*names).open("w"))


def flip_bit(run: Run) -> None:
    file = weights(run)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def other_step(run: Run) -> None:
    file = newest_state(run) / "rank-0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 600}))


def torn_line(run: Run) -> None:
    with (run.stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')


def cut_lineage(run: Run) -> None:
    file = run.stage / "lineage.json"
    file.with_name("lineage.copy").write_bytes(file.read_bytes())
    cut(lambda _: file)(run)


def mend_lineage(run: Run) -> None:
    (run.stage / "lineage.copy").rename(run.stage / "lineage.json")


def spoil_weight(run: Run) -> None:
    """One NaN in a tensor of the checkpoint that the stage starts from."""
    [file] = (run.folder / "sft" / "hf").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)


def clock_jumps(run: Run) -> None:
    """A day ahead, and two back."""
    for shift in ("86400", "-86400", "0"):
        run.clock.write_text(shift)
        first = run.step
        run.wait(lambda first=first: run.step >= first + 2, "two steps after the clock jumped")


def second_start(run: Run) -> None:
    second = subprocess.run(run.command(), env=run.environment(), capture_output=True, text=True, timeout=LIMIT)
    assert second.returncode == Ending.WRONG_INPUT and "is being written by process" in second.stderr + second.stdout


def close_terminal(run: Run) -> None:
    """The command ends by SIGHUP, the run goes on; a stop by its conductor, and a start again."""
    run.send(SIGHUP, "command")
    run.ended()
    first, deadline = run.step, time.monotonic() + LIMIT
    while run.step < first + 2:
        assert time.monotonic() < deadline, "no step after the terminal was closed"
        time.sleep(0.05)
    run.send(SIGTERM, "conductor")
    run.leave_nothing()
    run.start()


def read_only(run: Run) -> None:
    """A second mount of the run's folder over itself, which can't be written to; root may write anywhere else."""
    subprocess.run(["mount", "--bind", str(run.folder), str(run.folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(run.folder)], check=True)
    status = subprocess.run(
        [run.command()[0], "status", str(run.folder)], env=run.environment(), capture_output=True, text=True
    )
    assert status.returncode == 0 and "grpo" in status.stdout, status.stdout + status.stderr


def writable(run: Run) -> None:
    subprocess.run(["umount", "-l", str(run.folder)], check=True)


def little_room(run: Run) -> None:
    """A file system for training states with room for two and a half."""
    folder = run.stage / "checkpoints"
    folder.mkdir(parents=True)
    reference = saved_states(run.root.parent / "faults" / "grpo")
    size = sum(file.stat().st_size for file in next(iter(reference.values())).iterdir())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "tmpfs", str(folder)], check=True)


def give_room(run: Run) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", str(run.stage / "checkpoints")], check=True)


def starved(name: str) -> Injection:
    """Put a process into a control group without memory, where the kernel kills it for the next page."""

    def inject(run: Run) -> None:
        first = Path("/sys/fs/cgroup/memory")
        group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / "alignyard-faults"
        group.mkdir(exist_ok=True)
        limit = group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")
        limit.write_text(str(2**16))
        (group / "cgroup.procs").write_text(str(run.pid(name)))

    return inject


def fill_object_store(run: Run) -> None:
    """Another client keeps four times the store's size in it."""
    raylet = run.processes("raylet")[0]
    address = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address="))
    program = (
        "import ray, numpy, time\n"
        f"ray.init(address='{address}', log_to_driver=False)\n"
        "kept = [ray.put(numpy.ones(2**23)) for _ in range(5)]\nprint('full', flush=True)\ntime.sleep(20)\n"
    )
    # The second gives this machine the address 127.0.0.1, as the run's own cluster has it.
    environment = run.environment() | {"RAY_AUTH_MODE": "token", ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    client = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline() == b"full\n"
    first = run.step
    run.wait(lambda: run.step >= first + 3, "three steps with a full object store")
    client.kill()
    client.wait()


ENGINE, RANK, WORKER, JUDGE = "ray::EngineActor", "ray::TrainActor", "ray::RewardWorker", "rewards.pool.supervise"
RAYLET = r"Ray's node manager \(raylet\) of .* ended"
HALTED = r"process \d+ \(.*\) is stopped"
REPLACED, RESTARTED = r"rollout engine 0 .* replaced", r"a training rank died in .*restart \d+ of"
REWARDS = str(Path(__file__).with_name("rewards.py"))


def paid_by(reward: str, *others: str) -> tuple[str, ...]:
    return (f"stages.grpo.rewards=[{{name: '{REWARDS}:{reward}'}}]", *others)


FAULTS = [
    killed("the stage's driver", "driver", Ending.FAULT, "its process ended without a word"),
    Fault("SIGTERM to the stage's driver", signalled(SIGTERM, "driver"), Ending.FAULT, "ended without a word"),
    halted("the stage's driver", "driver", says=HALTED, goes_on=True),
    killed("an engine", ENGINE, says=REPLACED),
    Fault("SIGTERM to an engine", signalled(SIGTERM, ENGINE), says=REPLACED),
    halted("an engine", ENGINE, Ending.STOPPED, r"engine 0 \(process \d+ on .*, stopped"),
    killed("a training rank, with the reference in it", RANK, says=RESTARTED, restarts=True),
    Fault("SIGTERM to a training rank", signalled(SIGTERM, RANK), says=RESTARTED, restarts=True),
    halted("a training rank", RANK, Ending.STOPPED, r"late: rank 0 \(process .*, stopped"),
    killed("a reward worker", WORKER),
    Fault("SIGTERM to a reward worker", signalled(SIGTERM, WORKER)),
    halted("a reward worker", WORKER),
    killed("a judging process", JUDGE),
    halted("a judging process", JUDGE),
    Fault("`kill -9` of a sandbox", signalled(SIGKILL, "bwrap"), own=paid_by("Program")),
    killed("Ray's node manager (raylet)", "raylet", Ending.STOPPED, RAYLET),
    Fault("SIGTERM to the raylet", signalled(SIGTERM, "raylet"), Ending.STOPPED, RAYLET),
    halted("the raylet", "raylet", says=HALTED, goes_on=True),
    killed("Ray's head (GCS)", "gcs_server", Ending.STOPPED, r"Ray's head process \(gcs_server\) ended"),
    halted("Ray's head", "gcs_server", says=HALTED, goes_on=True),
    killed("the conductor", "conductor", Ending.FAULT, r"conductor \(process \d+\) ended by SIGKILL"),
    halted("the conductor", "conductor", goes_on=True),
    Fault("SIGTERM to the conductor", signalled(SIGTERM, "conductor"), Ending.INTERRUPTED, "the same command resumes"),
    Fault("Ctrl-C", signalled(SIGINT, "command"), Ending.INTERRUPTED, "the same command resumes"),
    Fault("the terminal is closed", close_terminal),
    Fault("a second start of the run", second_start),
    Fault("the clock jumps a day ahead and two back", clock_jumps),
    Fault("newest training state: a file cut in half", cut(weights), says="its checksum differs", stopped=True),
    Fault("newest training state: a bit flipped", flip_bit, says="its checksum differs", stopped=True),
    Fault("newest training state: another step in its index", other_step, says="rank-0.json is not", stopped=True),
    Fault("newest training state: a file missing", lambda run: weights(run).unlink(), says="is missing", stopped=True),
    Fault("`metrics.jsonl`: a torn last line", torn_line, stopped=True),
    Fault("`run.json` empty", emptied("run.json"), says="run.json' is empty", stopped=True),
    Fault("`figures.json` empty", emptied("grpo", "figures.json"), says="figures.json' is damaged", stopped=True),
    Fault(
        "`lineage.json` cut in half",
        cut_lineage,
        Ending.WRONG_INPUT,
        "lineage.json' is damaged",
        stopped=True,
        undo=mend_lineage,
    ),
    Fault(
        "the run's folder is read-only",
        read_only,
        Ending.WRONG_INPUT,
        "can't be written to",
        stopped=True,
        undo=writable,
        needs_root=True,
    ),
    Fault(
        "no room for a training state",
        little_room,
        Ending.STOPPED,
        "make room",
        stopped=True,
        undo=give_room,
        own=(),
        needs_root=True,
    ),
    Fault("an engine out of memory", starved(ENGINE), says=r"lack of memory: lower(.|\n)*replaced", needs_root=True),
    Fault(
        "a training rank out of memory",
        starved(RANK),
        says=r"lack of memory: lower(.|\n)*restart \d+ of",
        restarts=True,
        needs_root=True,
    ),
    Fault(
        "a reward that leaks 1 GiB a call, in pool `model`",
        nothing,
        own=paid_by("Leak", "stages.grpo.reward_pool.memory_gib={Leak: 3}"),
    ),
    Fault(
        "`rollout.kv_cache_gib` beyond the memory",
        nothing,
        Ending.WRONG_INPUT,
        r"rollout\.kv_cache_gib=4000",
        own=("stages.grpo.rollout.kv_cache_gib=4000",),
    ),
    Fault(
        "the object store full",
        fill_object_store,
        own=(),
        environment={"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 * 10**6)},
    ),
    Fault(
        "a NaN in the first checkpoint", spoil_weight, Ending.WRONG_INPUT, "not finite .* in 1 tensors", True, own=()
    ),
    Fault(
        "weights that an update makes infinite",
        nothing,
        Ending.STOPPED,
        "not finite",
        own=("stages.grpo.optimizer.learning_rate=1e38",),
    ),
    Fault(
        "a reward of NaN for half of the completions",
        nothing,
        Ending.STOPPED,
        "must be finite",
        own=paid_by("nan_for_some"),
    ),
    Fault("a reward of 1e200", nothing, Ending.STOPPED, "a score must lie between", own=paid_by("huge")),
]
IS_ROOT = os.geteuid() == 0
