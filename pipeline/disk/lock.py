"""One writer at a time in a folder: a lock that ends with its holder, however that ends."""

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
"""What a killed job's processes may take to end, and then some."""


@contextmanager
def locked(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Holds `folder`, and creates it, while the block runs. The kernel releases it when the process dies.

    Raises ValueError naming the process that still holds it after `wait_seconds`, and where the folder can't be
    written to.
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
        while not _taken(lock, fcntl.LOCK_EX):
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
    """Who holds `folder`, in words; empty where nobody does."""
    file = folder / LOCK
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8") as lock:  # a reader may have no right to write
        if _taken(lock, fcntl.LOCK_SH):
            return ""
        text = lock.read()
    try:
        named = json.loads(text)
    except json.JSONDecodeError:  # taken a moment ago, not signed yet
        return "another process"
    return f"process {named['pid']} on {named['host']}"


def _taken(lock: TextIO, kind: int) -> bool:
    """Try to take the lock of this `kind`, exclusive or shared, and return whether it is taken. Closing the file
    releases it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
