"""The files of docs/clusters: Ray's own check of one, another run with stubs of Slurm, the same versions in all."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.waiting import wait_until

FOLDER = Path(__file__).parents[2] / "docs" / "clusters"


def manifest(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_ray_up_accepts_its_file() -> None:
    config = prepare_config(manifest("ray_up.yaml"))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_ray_up_refuses_an_unknown_key() -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(manifest("ray_up.yaml") | {"max_worker": 2}))


def test_both_manifests_have_the_same_cluster_of_the_installed_ray() -> None:
    cluster, job = manifest("raycluster.yaml")["spec"], manifest("rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster == job and cluster["rayVersion"] == version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert {container["image"] for container in containers} == {"registry.example.com/alignyard-gpu:0.1.0"}
    for container in containers:
        assert {"/shared", "/dev/shm"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "alpha\\nbeta\\n"; fi',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": "exec sleep 20",
    # The first question after the nodes comes too early.
    "python": "if [ $# = 2 ]; then echo of-a-test; else [ -e asked ] || { touch asked; exit 1; }; fi",
    "alignyard": "sleep ${SECONDS_OF_RUN:-0}; exit 3",
}
"""Programs that the Slurm script calls; each also writes its arguments into `calls`."""


def slurm(folder: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Start the script with stubs of all programs, on two nodes."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in STUBS.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{text}\n')
        (programs / name).chmod(0o755)
    slurms = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "alpha,beta"}
    return subprocess.Popen(
        ["bash", str(FOLDER / "slurm.sh"), "my.yaml", "runs_dir=/shared/runs"],
        cwd=folder,
        env=os.environ | slurms | {"ALIGNYARD": str(folder)} | variables,
        start_new_session=True,
    )


@pytest.fixture
def ended() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes whose sessions end with the test, as Slurm ends a job's steps."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_slurm_script_starts_ray_on_every_node_and_ends_as_the_run_does(
    tmp_path: Path, ended: list["subprocess.Popen[bytes]"]
) -> None:
    ended.append(slurm(tmp_path))
    assert ended[0].wait() == 3
    calls = (tmp_path / "calls").read_text()
    [head] = re.findall(r"^ray start --head .*", calls, re.M)
    [worker] = re.findall(r"^ray start --address.*", calls, re.M)
    assert "--node-ip-address=10.0.0.1 --port=6379" in head and "--address=10.0.0.1:6379" in worker
    assert re.search(r"^srun .*--nodelist=alpha ray start --head", calls, re.M)
    assert re.search(r"^srun .*--nodes=1 --ntasks=1 --exclude=alpha ray start --address", calls, re.M)
    assert "alignyard run my.yaml runs_dir=/shared/runs --address http://10.0.0.1:8265" in calls


def test_the_slurm_script_queues_itself_again_before_its_time_is_over(
    tmp_path: Path, ended: list["subprocess.Popen[bytes]"]
) -> None:
    ended.append(slurm(tmp_path, SECONDS_OF_RUN="50"))
    calls = tmp_path / "calls"
    wait_until(lambda: (calls.is_file() and "alignyard run" in calls.read_text()) or ended[0].poll() is not None)
    assert ended[0].poll() is None
    ended[0].send_signal(signal.SIGUSR1)
    assert ended[0].wait()
    assert "scontrol requeue 42" in calls.read_text()
