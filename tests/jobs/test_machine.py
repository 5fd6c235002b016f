"""The report on GPUs, with stand-ins for nvidia-smi and torch.cuda."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from jobs.machine import Finding, machine
from jobs.verbs import doctor

GIB = 2**30
GPU = {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0}
Reader = Callable[..., dict[str, Finding]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """The findings on a machine with these GPUs, by subject."""

    def read_machine(
        count: int = 8,
        driver: str = "580.65.06",
        cuda: str | None = "13.0",
        nccl: tuple[int, ...] = (2, 29, 7),
        gpu: dict[str, Any] = GPU,
        free: float = 79.0,
        visible: bool = True,
        strangers: tuple[int, ...] = (),
        shared: float = 64.0,
    ) -> dict[str, Finding]:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + f"echo {driver}\n" * count)
        program.chmod(0o755)
        if not count:
            program.unlink()
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        stand_ins = {
            "is_available": lambda: visible and count > 0,
            "device_count": lambda: count if visible else 0,
            "get_arch_list": lambda: ["sm_80", "sm_90", "sm_100", "sm_120"],
            "get_device_properties": lambda _: SimpleNamespace(**gpu),
            "mem_get_info": lambda _: (int(free * GIB), 80 * GIB),
            "can_device_access_peer": lambda a, b: not {a, b} & set(strangers),
        }
        for name, function in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
        usage = SimpleNamespace(free=shared * GIB, total=shared * GIB)
        disk_usage = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if path == "/dev/shm" else disk_usage(path))
        return {finding.subject: finding for finding in machine()}

    return read_machine


def problems(findings: dict[str, Finding]) -> set[str]:
    return {subject for subject, finding in findings.items() if finding.missing}


def test_a_sound_machine_is_described_without_a_remedy(read: Reader) -> None:
    findings = read()
    assert not problems(findings)
    assert findings["driver"].state == "580.65.06" and findings["CUDA"].state == "13.0"
    assert findings["NCCL"].state == "2.29.7" and findings["peer access"].state == "56 of 56 pairs"
    assert findings["GPU 7"].state == "NVIDIA H100 80GB HBM3, 79 of 80 GiB free, compute capability 9.0"


def test_without_a_gpu_one_line_says_so(read: Reader) -> None:
    findings = read(count=0)
    assert findings["GPU"].state == "none: everything runs on the CPU" and not findings["GPU"].missing
    assert not {"driver", "CUDA", "NCCL", "peer access"} & findings.keys()


@pytest.mark.parametrize(
    "driver, cuda, old", [("570.1", "13.0", True), ("570.1", "12.9", False), ("520", "12.4", True)]
)
def test_a_driver_that_is_too_old_for_cuda_is_required(read: Reader, driver: str, cuda: str, old: bool) -> None:
    found = read(driver=driver, cuda=cuda)["driver"]
    assert found.missing == old and found.required
    assert "update it to" in found.purpose


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"cuda": None}, "make setup EXTRA=gpu"),
        ({"driver": "535.129.03"}, "too old for CUDA 13.0: update it to 580"),
        ({}, "docker run --gpus all"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_required(read: Reader, changes: dict[str, Any], remedy: str) -> None:
    found = read(visible=False, **changes)["GPU"]
    assert found.missing and found.required and remedy in found.purpose


@pytest.mark.parametrize(
    "changes, subject, remedy",
    [
        ({"nccl": (2, 8, 4)}, "NCCL", "LD_PRELOAD"),
        ({"strangers": (3,)}, "peer access", "nvidia-smi topo"),
        ({"gpu": GPU | {"name": "Tesla V100", "major": 7}}, "GPU 0", "compute capability 8.0"),
        ({"gpu": GPU | {"major": 11}}, "GPU 0", "install a build for this GPU"),
        ({"free": 30.0}, "GPU 0", "other processes"),
        ({"shared": 0.0625}, "/dev/shm", "give it 8 GiB"),
    ],
)
def test_each_fault_has_a_remedy(read: Reader, changes: dict[str, Any], subject: str, remedy: str) -> None:
    found = read(**changes)[subject]
    assert found.missing and remedy in found.purpose


def test_one_gpu_has_no_peer(read: Reader) -> None:
    assert read(count=1)["peer access"].state == "one GPU"


def test_the_report_ends_with_1_for_an_old_driver(read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    read(driver="535.1")
    for part in ("packages", "compiler", "languages"):
        monkeypatch.setattr(doctor, part, lambda: ())
    text = io.StringIO()
    assert doctor.report(Console(file=text, width=160)) == 1
    assert "missing: driver" in text.getvalue() and "update it to 580" in text.getvalue()
