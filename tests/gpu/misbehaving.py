"""Checks that end in every way in which a check can end, for test_run.py."""

import os
import signal
import time
from pathlib import Path

from tests.gpu.check import Skip


def passes(_: Path) -> str:
    return "all is well"


def fails(_: Path) -> str:
    raise AssertionError("3 | 4\nis wrong")


def skips(_: Path) -> str:
    raise Skip("no such device")


def crashes(_: Path) -> str:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def hangs(folder: Path) -> str:
    child = os.fork()
    if child:
        (folder / "child").write_text(str(child))
    time.sleep(600)
    return ""
