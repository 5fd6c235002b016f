"""Machines that one machine imitates: network, mount, process and host name spaces of the kernel, joined by a bridge.

Every machine has its own interface, /tmp, /dev/shm, home and processes. A folder is seen by those that it is given to.
`within` starts a program in which machines can be made; all of them end with it, whatever happens.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from tests.waiting import wait_until

HOME = Path(__file__).parents[2]
SHARED = Path("/mnt/runs")
"""The run's address: the one folder that machines share."""
_ELSEWHERE = Path("/mnt/elsewhere")
"""Place of the installation on machines that have it at another path."""
Code = Literal["here", "elsewhere", "none"]
_VLLM_CACHE = shlex.quote(str(Path("~/.cache/vllm").expanduser()))
"""Folder of facts about models, which vLLM gathers in half a minute at its first start on a machine."""
NETWORK = "10.77.0"
START_SECONDS = 300.0
_ATTEMPTS = 4
TOKEN = "of-the-imitated-machines-and-no-secret"

_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
_OUTER = ["setpriv", "--pdeathsig=KILL", *_UNSHARE]  # ends with the process that starts it


def why_forbidden() -> str:
    """Return the reason for which this user can't make machines; empty where it can."""
    probe = "ip link add probe type bridge && mount -t tmpfs none /mnt && unshare --net --mount --uts --pid --fork true"
    try:
        result = subprocess.run([*_outer(), "sh", "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        return f"no {error.filename} (package util-linux)"
    return "" if not result.returncode else f"name spaces are forbidden here: {result.stderr.strip()[:200]}"


def within(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module where machines can be made."""
    return [*_outer(), sys.executable, "-m", module, *arguments]


def _outer() -> list[str]:
    return _OUTER if os.geteuid() == 0 else [*_OUTER, "--user", "--map-root-user"]


def prepare(shared: Path) -> None:
    """Make the bridge, and put the folder `shared` at the run's address. For the first process of `within`."""
    _run(
        "ip link set lo up",
        f"ip link add bridge type bridge && ip addr add {NETWORK}.254/24 dev bridge && ip link set bridge up",
        f"mount -t tmpfs none /mnt && mkdir -p {SHARED} {_ELSEWHERE}/code {_ELSEWHERE}/venv",
        f"mount --bind {shared} {SHARED}",
    )


class Machine:
    """One machine; it runs nothing until `start_ray`."""

    def __init__(
        self,
        name: str,
        number: int,
        *,
        shares: bool = True,
        code: Code = "here",
        lacks: Sequence[Path] = (),
        setup: str = "",
    ) -> None:
        """Start it.

        shares: it sees the run's folder. code: it has this checkout here, or at another place where its Python finds
        it, as an installation on another system would be, or Python's packages without it. lacks: files that it doesn't
        have. setup: further shell commands at its start.
        """
        self.name, self.address = name, f"{NETWORK}.{number}"
        setup = "\n".join(
            [
                "set -e",
                f"hostname {name}",
                *([] if code == "here" else _move_installation(code)),
                "mount -t tmpfs none /tmp && mkdir -p /tmp/home && mount -t tmpfs none /dev/shm",
                # Without a name of its own a process waits for minutes for a name server that none of them reaches.
                f"echo '127.0.0.1 localhost\n{self.address} {name}' > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts",
                "mount --bind /dev/null /etc/resolv.conf",
                *([] if shares else [f"mount -t tmpfs none {SHARED}"]),
                *(f"mount --bind /dev/null {shlex.quote(str(file))}" for file in lacks),
                setup,
                f"if [ -d {_VLLM_CACHE} ]; then mkdir /tmp/home/.cache && cp -r {_VLLM_CACHE} /tmp/home/.cache; fi",
                "touch /tmp/ready",
                "sleep infinity & wait",
            ]
        )
        self._process = subprocess.Popen([*_UNSHARE, "--uts", "bash", "-c", setup], stdin=subprocess.DEVNULL)
        self._await_network()
        self._first = int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])
        self._code = code
        self.python = sys.executable if code == "here" else f"{_ELSEWHERE}/venv/bin/python"
        self._ray = [self.python, "-m", "ray.scripts.scripts"]
        self._await(lambda: self.run("test", "-e", "/tmp/ready").returncode == 0)

    def _await(self, condition: Callable[[], object]) -> None:
        """Wait for a step of the start, as long as the machine's first process lives."""

        def is_done() -> object:
            assert self._process.poll() is None, f"{self.name} does not start"
            return condition()

        wait_until(is_done)

    def _await_network(self) -> None:
        own, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{self._process.pid}/ns/net")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._await(lambda: theirs.readlink() != own.readlink() and children.read_text())
        enter = f"nsenter --target {self._process.pid} --net ip"
        _run(
            f"ip link add to-{self.name} type veth peer name eth0 netns {self._process.pid}",
            f"ip link set to-{self.name} master bridge up",
            f"{enter} link set lo up && {enter} link set eth0 up && {enter} addr add {self.address}/24 dev eth0",
            f"{enter} route add default via {NETWORK}.254",
        )

    def command(self, *command: str, environment: Mapping[str, str] | None = None, folder: str = "/tmp") -> list[str]:
        """Return the command that runs `command` on this machine."""
        variables = {
            "HOME": "/tmp/home",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's dashboard has ten processes, which take long to start on a busy machine.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(START_SECONDS)),
            "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(int(START_SECONDS)),
            **({"PYTHONPATH": str(HOME)} if self._code == "here" else {"PYTHONDONTWRITEBYTECODE": "1"}),
            **(environment or {}),
        }
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "COLUMNS") if key in os.environ}
        pairs = [f"{key}={value}" for key, value in (kept | variables).items()]
        enter = ["nsenter", f"--target={self._first}", "--net", "--mount", "--pid", "--uts", f"--wdns={folder}"]
        return [*enter, "env", "-i", *pairs, *command]

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, folder: str = "/tmp", seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine to its end."""
        whole = self.command(*command, environment=environment, folder=folder)
        return subprocess.run(whole, capture_output=True, text=True, timeout=seconds, check=False)

    def start_ray(self, head: "Machine | None" = None, *, cpus: int = 1, **environment: str) -> None:
        """Start Ray's processes: the head's, or those of a machine that joins `head`."""
        where = (
            [f"--address={head.address}:6379"]
            if head
            else ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--include-dashboard=true"]
        )
        own = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", f"--object-store-memory={150 * 2**20}"]
        command = [*self._ray, "start", *where, *own, "--disable-usage-stats"]
        output = ""
        for _ in range(_ATTEMPTS):  # Ray gives a node 30 s, which are few on a busy machine
            result = self.run(*command, environment=environment, seconds=2 * START_SECONDS)
            if not result.returncode:
                return
            output = result.stdout[-2000:] + result.stderr[-2000:]
            self.run(*self._ray, "stop", "--force", seconds=START_SECONDS)
        raise AssertionError(f"ray start on {self.name}: {output}")

    def alignyard(self, *arguments: str, folder: str = "/tmp", seconds: float = 60) -> tuple[int, str]:
        """Run the command on this machine; return its exit code and output."""
        started = [self.python, "-P", "-m", "jobs.cli", *arguments]
        result = self.run(*started, folder=folder, seconds=seconds, environment={"COLUMNS": "200"})
        return result.returncode, result.stdout + result.stderr

    def write(self, files: Mapping[str, str], folder: str) -> None:
        """Write text files on this machine, by their paths below `folder`."""
        for name, text in files.items():
            file = shlex.quote(f"{folder}/{name}")
            write = ["sh", "-c", f"mkdir -p $(dirname {file}) && cat > {file}"]
            subprocess.run(self.command(*write), input=text, text=True, timeout=60, check=True)

    def link_bytes(self) -> int:
        """Return the bytes that went through its link so far, both ways."""
        show = ["ip", "-s", "-j", "link", "show", f"to-{self.name}"]
        statistics = json.loads(subprocess.run(show, capture_output=True, check=True, timeout=60).stdout)[0]["stats64"]
        return statistics["rx"]["bytes"] + statistics["tx"]["bytes"]

    def stop(self) -> None:
        """End all its processes at once. The kernel still closes their connections, as that of a real machine does
        whose processes are killed."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=60)


def _move_installation(code: Code) -> list[str]:
    """Shell commands that hide this checkout, and bind it where the machine's own Python looks for it, or nowhere."""
    prefix = Path(sys.prefix).resolve()
    finder = next(prefix.glob("lib/python*/site-packages/__editable___alignyard_*_finder.py"))
    start = next(finder.parent.glob("__editable__.alignyard-*.pth"))
    elsewhere, own = _ELSEWHERE / "code", _ELSEWHERE / finder.name
    old = r"'[^']*/\(alignyard\|configs\|jobs\|pipeline\|rewards\|rollout\)"
    if code == "elsewhere":
        commands = [
            f"mount --bind {shlex.quote(str(HOME))} {elsewhere}",
            f'sed "s:{old}:\'{elsewhere}/\\1:g" {shlex.quote(str(finder))} > {own}',
            f"mount --bind {own} {_ELSEWHERE}/venv/{finder.relative_to(prefix)}",
        ]
    else:
        commands = [f"mount --bind /dev/null {_ELSEWHERE}/venv/{start.relative_to(prefix)}"]
    return [
        f"mount --bind {shlex.quote(str(prefix))} {_ELSEWHERE}/venv",
        *commands,
        f"mount -t tmpfs none {shlex.quote(str(HOME))}",
    ]


def _run(*commands: str) -> None:
    for command in commands:
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert not result.returncode, f"{command}: {result.stderr}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table of Markdown; the first is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
