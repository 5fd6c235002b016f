"""The run that faults are injected into: its command, its processes, its steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from pipeline.disk.lock import holder
from pipeline.disk.run_record import RunRecord
from pipeline.train.checkpoints import saved_states
from tests.series import series

HERE = Path(__file__).parent
RECIPE = HERE / "recipe.yaml"
LIMIT = 400.0
"""Longest wait for anything, in seconds, ten times what it takes on an idle machine."""
REPLACEMENT = ("rollout/replaced_engines", "rollout/continued_tokens", "rollout/restarted_completions")
"""Figures that say that an engine was replaced, which an unharmed run doesn't have."""


class Run:
    """A run of the recipe below `folder`, of which `alignyard run` may be running."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder, folder / "faults"
        self.stage = self.folder / "grpo"
        self.clock = folder / "clock"
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / "output.txt"
        self._log: IO[bytes] | None = None

    def command(self, *overrides: str) -> list[str]:
        program = str(Path(sys.executable).with_name("alignyard"))
        return [program, "run", str(RECIPE), f"runs_dir={self.root}", *overrides]

    def environment(self) -> dict[str, str]:
        paths = [str(HERE / "clock"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "COLUMNS": "200",
            "FAULTS_CLOCK": str(self.clock),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }

    def start(self, *overrides: str, environment: Mapping[str, str] = {}) -> None:
        """Start the command, and wait for nothing."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._log = self.output.open("wb")
        self.process = subprocess.Popen(
            self.command(*overrides),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**self.environment(), **environment},
            start_new_session=True,
            preexec_fn=default_signals,
        )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.is_file() else ""

    def ended(self) -> int:
        """Wait for the command to end, and return its exit code."""
        assert self.process is not None
        return self.process.wait(LIMIT)

    def stop(self) -> None:
        """Ctrl-C, where it runs."""
        if self.is_running:
            assert self.process is not None
            self.process.send_signal(signal.SIGINT)
            self.ended()
        self.leave_nothing()

    @property
    def step(self) -> int:
        """The newest step of metrics.jsonl."""
        file = self.stage / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        for line in reversed(lines):
            with suppress(ValueError):
                return int(json.loads(line)["step"])
        return 0

    @property
    def saved_step(self) -> int:
        return max(saved_states(self.stage), default=0)

    def rows(self) -> list[dict[str, float]]:
        rows = series(self.stage / "metrics.jsonl", "reward_pool/")
        return [{name: value for name, value in row.items() if name not in REPLACEMENT} for row in rows]

    def wait(self, until: Callable[[], bool], what: str) -> float:
        """Wait while the command runs. Return the seconds it took."""
        began = time.monotonic()
        while not until():
            assert self.is_running, f"{what}: the command ended\n{self.text[-4000:]}"
            assert time.monotonic() - began < LIMIT, f"{what}: never\n{self.text[-4000:]}"
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_for_steps(self, first: int) -> float:
        """Wait until step `first` is written in this start of the command."""
        file, started = self.stage / "metrics.jsonl", self.output.stat().st_ctime
        return self.wait(
            lambda: file.is_file() and file.stat().st_mtime > started and self.step >= first, f"step {first}"
        )

    def processes(self, *names: str) -> list[psutil.Process]:
        """The processes of the run whose titles begin with one of `names`; a module's is in a command's last word."""
        found: list[psutil.Process] = []
        for process in psutil.Process(self.conductor).children(recursive=True):
            with suppress(psutil.Error, IndexError):
                words = process.cmdline()
                title = Path(words[0].split(" ")[0]).name
                if any(name in words[-1] if "." in name else title.startswith(name) for name in names):
                    found.append(process)
        return found

    @property
    def conductor(self) -> int:
        return RunRecord.read(self.folder).pid

    @property
    def driver(self) -> int:
        """The process of the stage."""
        return int(re.findall(r"process (\d+)", holder(self.stage))[0])

    def send(self, number: signal.Signals, name: str) -> None:
        """Send a signal to one process by name; "driver", "conductor" and "command" are these."""
        os.kill(self.pid(name), number)

    def pid(self, name: str) -> int:
        if name == "command":
            assert self.process is not None
            return self.process.pid
        own = {"driver": lambda: self.driver, "conductor": lambda: self.conductor}
        if name in own:
            return own[name]()
        found: list[psutil.Process] = []
        self.wait(lambda: found.extend(self.processes(name)) or bool(found), f"a process {name}")
        return found[-1].pid

    def leave_nothing(self) -> None:
        """Wait until no process of an ended run holds its folders."""
        deadline = time.monotonic() + LIMIT
        while holder(self.folder) or holder(self.stage):
            assert time.monotonic() < deadline, f"still held: {holder(self.folder)} {holder(self.stage)}"
            time.sleep(0.1)

    def copy_of_sft(self, name: str) -> "Run":
        """Another run, which has this one's finished first stage."""
        other = Run(self.root / name)
        shutil.rmtree(other.root, ignore_errors=True)
        shutil.copytree(self.folder / "sft", other.folder / "sft")
        return other


def default_signals() -> None:
    """SIGHUP and SIGINT end the command, whatever these tests were started by."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
