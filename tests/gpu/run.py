"""`make test-gpu`: check on one GPU, in eight minutes, what stand-ins can only imitate, and write a table.

Every check runs in a process of its own with a time limit and ends with a verdict: passed, failed or skipped. Ends with
1 if one failed, with 2 on a machine without a GPU. `--cpu` runs what a CPU can run, which tests this script only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rollout.process import compute_environment, free_port, num_threads
from tests.gpu.check import CHECKS, Check

BUDGET_SECONDS = 480
"""Time for all checks: one that would begin later is skipped."""
ROOT = Path(__file__).parents[2]
_PATIENCE = 4
"""Factor of every time limit in CPU mode, where the cores may be shared."""
CPU_NOTE = "CPU mode: this tests the script. It shows nothing about a GPU."


@dataclass(frozen=True)
class Outcome:
    """A finished check."""

    check: Check
    verdict: str
    detail: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print and write the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make test-gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CHECK", help="only these checks; all without a name")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, which tests this script only")
    parser.add_argument("--out", type=Path, default=Path("runs/test_gpu"), help="folder for table and logs")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {check.name for check in CHECKS}
    if unknown:
        parser.error(f"no check is called {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CHECKS)}")
    machine = _machine(cpu=options.cpu)
    if machine is None:
        print("no GPU: nvidia-smi finds none. `make test-gpu CPU=1` tests the script without one.", file=sys.stderr)
        return 2
    chosen = [check for check in CHECKS if check.name in options.names or not options.names]
    print(machine, flush=True)
    deadline = time.monotonic() + BUDGET_SECONDS * (_PATIENCE if options.cpu else 1)
    outcomes = []
    for check in chosen:
        outcomes.append(run_in_process(check, options.out, cpu=options.cpu, deadline=deadline))
        print(f"{check.name:14s} {outcomes[-1].verdict:8s} {outcomes[-1].detail.splitlines()[0][:300]}", flush=True)
    table = write_table(machine, outcomes, options.out)
    counts = Counter(outcome.verdict for outcome in outcomes)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {table}")
    return 1 if counts["failed"] else 0


def run_in_process(check: Check, out: Path, *, cpu: bool, deadline: float) -> Outcome:
    """Run one check in a process group of its own, and kill the group at its limit or at the deadline."""
    started = time.monotonic()
    limit = min(check.seconds * (_PATIENCE if cpu else 1), deadline - started)
    if limit < 10:
        return Outcome(check, "skipped", f"the {BUDGET_SECONDS} s were over: make test-gpu ONLY={check.name}", 0.0)
    folder = (out / check.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    verdict, log = folder / "verdict.json", folder / "log"
    verdict.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.one", json.dumps(asdict(check)), str(folder)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=_environment(cpu=cpu), cwd=ROOT, start_new_session=True
        )
        try:
            process.wait(timeout=limit)
            problem = f"the process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"not done in {limit:.0f} s"
        finally:
            _kill_group(process.pid)
            process.wait()
    seconds = time.monotonic() - started
    if verdict.is_file():
        return Outcome(check, **json.loads(verdict.read_text()), seconds=seconds)
    last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "no output")
    return Outcome(check, "failed", f"{problem}: {last} (all of it in {log})", seconds)


def write_table(machine: str, outcomes: Sequence[Outcome], out: Path) -> Path:
    """Write the outcomes as a Markdown table and as JSON; return the path of the table."""
    lines = [machine, "", "| check | row of docs/gpu.md | verdict | seconds | detail |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        detail = " ".join(outcome.detail.split()).replace("|", "\\|")[:600]
        row = outcome.check.row
        lines.append(f"| {outcome.check.name} | {row} | {outcome.verdict} | {outcome.seconds:.0f} | {detail} |")
    out.mkdir(parents=True, exist_ok=True)
    table = out / "table.md"
    table.write_text("\n".join(lines) + "\n")
    rows = [{"check": x.check.name, "verdict": x.verdict, "seconds": x.seconds, "detail": x.detail} for x in outcomes]
    (out / "table.json").write_text(json.dumps({"machine": machine, "checks": rows}, indent=1))
    return table


def _machine(*, cpu: bool) -> str | None:
    """Describe the GPU in one line; None for a machine without one. The parent asks nvidia-smi, since torch would take
    memory of the device."""
    if cpu:
        return CPU_NOTE
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"GPU 0 of {len(answer)}: {answer[0]}" if answer else None


def _environment(*, cpu: bool) -> dict[str, str]:
    """The environment of a single training rank, on the first device or on none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    own = {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "" if cpu else first, "PYTHONPATH": path}
    return os.environ | compute_environment(num_threads(0)) | group | own


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
