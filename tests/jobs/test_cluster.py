"""Runs on a cluster that was there before, as from another machine: nothing but the address of its job server."""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.cluster.room import quoted_interpreter
from rollout.process import free_port

pytestmark = pytest.mark.ranks

SECONDS = 240
BIN = Path(sys.executable).parent
STAGE = """
type: sft
model: {init_config: tiny}
data: {source: {type: sums, size: 200}, max_length: 64}
conversations_per_step: 8
steps: 2
optimizer: {learning_rate: 5e-3}
"""
HEAD = ("start", "--head", "--block", "--include-dashboard=true", "--num-gpus=1", "--disable-usage-stats")
PORTS = ("--port=0", "--dashboard-port=0", "--dashboard-agent-listen-port=0")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster with one GPU, which it only believes in."""
    with tempfile.TemporaryDirectory(prefix="ay") as folder:  # Ray's sockets need a short path
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        client_port = f"--ray-client-server-port={free_port()}"  # the one port that Ray wants to be told
        command = [str(BIN / "ray"), *HEAD, *PORTS, client_port, f"--temp-dir={folder}"]
        log = Path(folder, "head.log")
        with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as head:
            try:
                deadline = time.monotonic() + SECONDS
                while not (address_file := Path(folder, "ray_current_cluster")).is_file():
                    assert head.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
                yield address_file.read_text().strip()
            finally:
                head.terminate()
                head.wait(timeout=60)


def alignyard(folder: Path, *arguments: str) -> tuple[int, str]:
    result = subprocess.run(
        [str(BIN / "alignyard"), *arguments],
        cwd=folder,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


@contextmanager
def somebody_elses_gpu(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While the block runs, an actor of another Ray job has the cluster's GPU."""

    class Holder:
        def here(self) -> None: ...

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    gc.collect()  # a handle that an earlier cluster of this process left behind may bear the new actor's id, and end it
    ray.init(address=address, log_to_driver=False, runtime_env=quoted_interpreter())
    try:
        holder: Any = ray.remote(num_gpus=1)(Holder).remote()
        ray.get(holder.here.remote(), timeout=SECONDS)
        yield
    finally:
        ray.shutdown()


@pytest.mark.timeout(900)
def test_two_jobs_at_once_and_one_that_never_fits(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for a GPU that somebody else has, who is named, and then for each other."""
    (tmp_path / "stage.yaml").write_text(STAGE)
    deadline = time.monotonic() + SECONDS
    with somebody_elses_gpu(address, monkeypatch):
        for name, override in (("one", "seed=1"), ("two", "seed=2"), ("big", "trainer.num_ranks=2")):
            code, text = alignyard(
                tmp_path, "submit", "sft", "stage.yaml", override, "--output", f"runs/{name}", "--address", address
            )
            assert code == 0 and f"started {name}" in text, text
        console = tmp_path / "runs" / "one" / "sft" / "console.log"
        while not console.is_file() or "waiting for room" not in console.read_text():
            assert time.monotonic() < deadline, alignyard(tmp_path, "logs", "one", "--address", address)
            time.sleep(0.2)
        assert re.search(
            r"waiting for room: asks for 1 GPUs \(1 training rank\), 0 are free: \S+ \(1 GPUs, 0 free\); "
            r"held by \S*Holder of Ray job \w+ \(1 GPU\)",
            console.read_text(),
        ), console.read_text()
        assert not (tmp_path / "runs" / "one" / "sft" / "metrics.jsonl").is_file()
        again = ("submit", "sft", "stage.yaml", "seed=1", "--output", "runs/one", "--address", address)
        code, text = alignyard(tmp_path, *again)
        assert code == 2 and "is being written by Ray job one-" in text, text
    states: dict[str, str] = {}
    deadline = time.monotonic() + SECONDS
    while set(states.values()) != {"done", "failed"} or len(states) < 3:
        assert time.monotonic() < deadline, [alignyard(tmp_path, "logs", n, "--address", address) for n in states]
        time.sleep(1)
        files = {name: tmp_path / "runs" / name / "run.json" for name in ("one", "two", "big")}
        states = {name: json.loads(file.read_text())["state"] for name, file in files.items() if file.is_file()}
        assert "failed" not in (states.get("one"), states.get("two")), alignyard(
            tmp_path, "logs", "one", "--address", address
        )
    assert states == {"one": "done", "two": "done", "big": "failed"}
    refused = alignyard(tmp_path, "logs", "big", "--address", address)[1]
    assert "asks for 2 GPUs (2 training ranks), the cluster has 1" in refused and "lower trainer.num_ranks" in refused
    listed = alignyard(tmp_path, "list", "--address", address)[1]
    assert all(name in listed for name in states)
    status = alignyard(tmp_path, "status", "two", "--address", address)[1]
    assert "two-sft-" in status and "succeeded" in status
    assert "2/2" in alignyard(tmp_path, "logs", "two", "sft", "--address", address)[1]
    while "two is not running" not in (text := alignyard(tmp_path, "stop", "two", "--address", address)[1]):
        assert time.monotonic() < deadline, text  # its job ends a moment after the run is done
