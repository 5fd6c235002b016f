"""`make soak`: one run with a random fault every twenty steps, and what its processes hold between the faults.

Ends with 1 where memory, shared memory, descriptors or processes grew from the first third of the looks to the last.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median

import psutil

from tests.faults.cases import FAULTS
from tests.faults.run import PAGE, measure
from tests.faults.run_folder import Run

EVERY_STEPS = 20
BEGIN, END = "<!-- measured by make soak -->", "<!-- end of soak -->"
GROWTH = {"memory_mib": 1.1, "shared_mib": 1.1, "descriptors": 1.05, "processes": 1.05}
"""Largest ratio of the medians of the last and the first third of the looks. An engine that was replaced holds other
memory than one that is old."""


@dataclass(frozen=True)
class Look:
    """Memory and files of a run's processes. memory_mib: without what they share; shared_mib: in use in /dev/shm."""

    step: int
    fault: str
    memory_mib: float
    shared_mib: float
    descriptors: int
    processes: int
    run_mib: float


def look(run: Run, fault: str) -> Look:
    memory = descriptors = count = 0
    conductor = psutil.Process(run.conductor)
    for process in [conductor, *conductor.children(recursive=True)]:
        try:
            memory += process.memory_full_info().uss
            descriptors += process.num_fds()
            count += 1
        except psutil.Error:
            continue  # it ended meanwhile
    files = [file.stat().st_size for file in run.folder.rglob("*") if file.is_file()]
    shared = shutil.disk_usage("/dev/shm").used
    return Look(run.step, fault, memory / 2**20, shared / 2**20, descriptors, count, sum(files) / 2**20)


def grown(looks: Sequence[Look]) -> dict[str, float]:
    """The growth of what grew by more than it may, as the ratio of the medians."""
    third = max(len(looks) // 3, 1)
    ratios = {
        name: median(getattr(each, name) for each in looks[-third:])
        / max(median(getattr(each, name) for each in looks[:third]), 1)
        for name in GROWTH
    }
    return {name: ratio for name, ratio in ratios.items() if ratio > GROWTH[name]}


def main(folder: Path, steps: int, seed: int = 0, page: Path = PAGE) -> int:
    """Run `steps` steps with a random fault every twenty that the run goes on from."""
    random_faults = random.Random(seed)
    chosen = [f for f in FAULTS if f.code is None and not f.stopped and f.own is None and not f.needs_root]
    run, looks, began, fault = Run(folder), list[Look](), time.monotonic(), "none"
    run.start()
    try:
        run.wait(lambda: run.step >= 3, "the first steps")
        while True:
            looks.append(look(run, fault))
            print(looks[-1], flush=True)
            if looks[-1].step >= steps:
                break
            fault = random_faults.choice(chosen).name
            measure(next(f for f in chosen if f.name == fault), run)
            target = looks[-1].step + EVERY_STEPS
            run.wait(lambda target=target: run.step >= target, f"step {target}")
    finally:
        run.stop()
    names = [field.name.replace("_", " ") for field in fields(Look)]
    lines = [
        " | ".join(f"{value:.0f}" if isinstance(value, float) else str(value) for value in astuple(e)) for e in looks
    ]
    table = "\n".join(f"| {line} |" for line in [" | ".join(names), "|".join(["---"] * len(names)), *lines])
    measured = (
        f"{steps} steps in {(time.monotonic() - began) / 60:.0f} minutes, load {os.getloadavg()[0]:.0f} at the end."
    )
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n\n{table}\n\n{END}{rest.partition(END)[2]}")
    print(f"grown: {grown(looks) or 'nothing'}")
    return bool(grown(looks))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), int(sys.argv[2])))
