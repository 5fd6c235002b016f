"""A lock on a folder, so that only one process writes to it. It ends with the process that holds it."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCK = ".lock"
WAIT_SECONDS = 30.0
"""Longest wait for the lock, more than the processes of a killed job take to end."""


@contextmanager
def locked(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Create and lock `folder` for the block. The kernel releases the lock when the process dies.

    Raises ValueError for a folder that can't be written to, and after `wait_seconds` naming the process that holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"'{folder}' can't be written to ({error.strerror}); give the run a folder that can, by --output or "
            "runs_dir=DIR"
        ) from error
    with lock:
        deadline = time.monotonic() + wait_seconds
        while not _acquire(lock, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"'{folder}' is being written by {holder(folder) or 'another process'}; wait for it or stop it"
                )
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        lock.flush()
        yield


def holder(folder: Path) -> str:
    """Name the process that holds `folder`; empty for none."""
    file = folder / LOCK
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8") as lock:  # a reader may lack the right to write
        if _acquire(lock, fcntl.LOCK_SH):
            return ""
        text = lock.read()
    try:
        process = json.loads(text)
    except json.JSONDecodeError:  # acquired a moment ago, its holder not written yet
        return "another process"
    return f"process {process['pid']} on {process['host']}"


def _acquire(lock: TextIO, kind: int) -> bool:
    """Try to acquire a lock, exclusive or shared by `kind`; return False if another process holds it. Closing the file
    releases the lock."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
