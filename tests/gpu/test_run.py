"""The script behind `make test-gpu`, run on the CPU, and its treatment of checks that fail, crash or hang."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import run
from tests.gpu.check import CHECKS, Check
from tests.gpu.run import CPU_NOTE, ROOT, main, run_in_process

ABSENT = ("ray", "vllm", "datasets", "pyarrow", "omegaconf", "xxhash", "typer", "rich", "pytest", "math_verify")
"""Packages that a machine with torch, transformers and deepspeed need not have."""


def misbehaving(name: str, *packages: str, seconds: int = 15) -> Check:
    return Check(name, "a row", seconds, "tests.gpu.misbehaving", packages)


def outcome(name: str, folder: Path, *packages: str) -> run.Outcome:
    return run_in_process(misbehaving(name, *packages), folder, cpu=True, deadline=time.monotonic() + 600)


@pytest.mark.parametrize(
    "name, verdict, detail",
    [
        ("passes", "passed", "all is well"),
        ("fails", "failed", "AssertionError: 3"),
        ("skips", "skipped", "no such device"),
        ("crashes", "failed", "ended with -11: the last words"),
        ("absent", "failed", "absent"),
    ],
)
def test_a_check_ends_with_a_verdict_whatever_it_does(name: str, verdict: str, detail: str, tmp_path: Path) -> None:
    result = outcome(name, tmp_path)
    assert result.verdict == verdict and detail in result.detail


def test_a_check_that_needs_a_package_is_skipped_without_it(tmp_path: Path) -> None:
    result = outcome("passes", tmp_path, "no_such_package")
    assert result.verdict == "skipped" and "no_such_package" in result.detail


def test_a_check_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_PATIENCE", 1)
    result = outcome("hangs", tmp_path)
    assert result.verdict == "failed" and "not done in 15 s" in result.detail
    child = int((tmp_path / "hangs" / "child").read_text())
    for _ in range(100):
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_after_the_budget_nothing_begins(tmp_path: Path) -> None:
    late = run_in_process(misbehaving("passes"), tmp_path, cpu=True, deadline=time.monotonic())
    assert late.verdict == "skipped" and "ONLY=passes" in late.detail


def test_the_exit_code_says_whether_a_check_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names, code in ((["passes", "skips"], 0), (["passes", "fails"], 1)):
        monkeypatch.setattr(run, "CHECKS", [misbehaving(name) for name in names])
        assert main(["--cpu", "--out", str(tmp_path)]) == code
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == CPU_NOTE
    assert table[-1].startswith("| fails | a row | failed |") and r"3 \| 4 is wrong" in table[-1]
    assert [row["verdict"] for row in json.loads((tmp_path / "table.json").read_text())["checks"]] == [
        "passed",
        "failed",
    ]


def test_a_machine_without_a_gpu_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err


def rows_of_the_page() -> list[list[str]]:
    """The rows of the checklist: path, where, state, check."""
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if len(row) == 4 and row[0] != "path"]


def test_every_check_exists_and_shows_a_row_of_the_page() -> None:
    paths = {row[0]: row[3] for row in rows_of_the_page()}
    for each in CHECKS:
        source = (ROOT / f"{each.module.replace('.', '/')}.py").read_text()
        assert f"\ndef {each.function}(" in source, each.name
        [check] = [check for path, check in paths.items() if path.startswith(each.row)]
        assert f"`{each.name}`" in check, each.name
    assert len({each.name for each in CHECKS}) == len(CHECKS)


def test_every_row_of_the_page_has_a_state_and_names_tests_that_exist() -> None:
    rows = rows_of_the_page()
    assert len(rows) > 40
    for path, _, state, _ in rows:
        kind, _, evidence = state.partition(": ")
        assert kind in ("open", "stand-in", "device"), f"{path}: {state}"
        assert kind == "open" or evidence, f"{path}: {state}"
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", evidence)
        assert tests or kind != "stand-in", f"{path}: {state}"
        for file, name in tests:
            assert f"def {name}" in (ROOT / file).read_text(), f"{path}: {file}::{name}"


@pytest.mark.ranks
def test_the_training_half_runs_on_a_machine_with_torch_transformers_and_deepspeed_alone(tmp_path: Path) -> None:
    for package in ABSENT:
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is absent')")
    names = ["device", "histogram", "attention", "experts", "fp8-products", "determinism", "resume", "engine"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.run", "--cpu", "--out", str(tmp_path / "out"), *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {row["check"]: row["verdict"] for row in json.loads((tmp_path / "out/table.json").read_text())["checks"]}
    assert verdicts == dict.fromkeys(names, "passed") | {"device": "skipped", "engine": "skipped"}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.engine
def test_no_check_fails_on_the_cpu(tmp_path: Path) -> None:
    assert main(["--cpu", "--out", str(tmp_path)]) == 0, (tmp_path / "table.md").read_text()
