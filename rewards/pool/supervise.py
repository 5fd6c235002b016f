"""First process of a judge: runs the judging process as its child, and ends whatever that one started.

A reward may start programs that leave its process group and lose their parent. The kernel gives such orphans to the
nearest ancestor that adopts them. This process does, so all that a judging process ever started are its descendants;
it kills no others.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from rewards.sandbox.cgroup import family

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def supervise(fd: int, folder: str) -> None:
    """Fork: the child serves the guard at the socket `fd`; this process outlives it and ends as it did.

    On SIGTERM, and with the guard's thread, it ends the judging process and removes `folder`, that one's temporary
    files.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # An exception in a handler would be lost in a callback, so the handler does the work and never returns.
    signal.signal(signal.SIGTERM, lambda *_: _stop(folder))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if child := os.fork():
        os.close(fd)  # so that the guard sees the end of the judging process
        status = None
        while status is None:
            pid, result = os.waitpid(-1, 0)
            status = result if pid == child else None
        _end_descendants()
        _end_as(os.waitstatus_to_exitcode(status))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()  # a signal to its process group does not reach this process
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also while a reward hangs in C code

    from rewards.pool.serve import serve

    serve(fd)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _stop(folder: str) -> NoReturn:
    _end_descendants()
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _end_descendants() -> None:
    """Kill all descendants of this process, and those that they start meanwhile."""
    own = os.getpid()
    with suppress(ChildProcessError):  # none is left
        while True:
            for pid in family(own):
                if pid != own:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _end_as(code: int) -> NoReturn:
    """End this process with an exit code, or by a signal if it is negative."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL needs no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
