"""The house's rules that a machine can hold: sizes, names, doors."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
ROOMS = ("configs", "rewards", "rollout", "pipeline", "jobs")
DOOR = HOME / "alignyard.py"
"""The module for Python, on top of the rooms: a file, because the folders are fixed."""
FILES = [DOOR, *(file for folder in (*ROOMS, "tests") for file in sorted((HOME / folder).rglob("*.py")))]
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "shared"}
# Seen from inside a room, these would hide the package of the same name from whoever puts the room on the path.
TAKEN = {"ray", "vllm", "deepspeed", "torch", "transformers"}
# A stage's driver, `run`, is a function like any other here: it reads as the paper only while it fits a screen.
LIMITS = {ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 200}
FILE_LIMIT = 400


def place(file: Path) -> str:
    return str(file.relative_to(HOME))


def too_long(file: Path) -> Iterator[str]:
    """Every function and class of `file` past its limit, decorators counted."""
    for node in ast.walk(ast.parse(file.read_text())):
        limit = LIMITS.get(type(node))
        if limit is None:
            continue
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.end_lineno
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        lines = node.end_lineno - first + 1
        if lines > limit:
            yield f"{place(file)}: {node.name} has {lines} lines, {limit} allowed"


def test_the_rooms_were_found() -> None:
    assert {file.relative_to(HOME).parts[0] for file in FILES} == {*ROOMS, "tests", DOOR.name}
    assert [file.name for file in HOME.glob("*.py")] == [DOOR.name]


def test_files_stay_short() -> None:
    long = {place(file): lines for file in FILES if (lines := len(file.read_text().splitlines())) > FILE_LIMIT}
    assert not long


def test_functions_and_classes_stay_short() -> None:
    assert not [complaint for file in FILES for complaint in too_long(file)]


def test_a_long_function_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HOME", tmp_path)
    file = tmp_path / "long.py"
    file.write_text("@cache\ndef f():\n" + "    x = 1\n" * 59)
    assert list(too_long(file)) == ["long.py: f has 61 lines, 60 allowed"]


def test_every_file_is_named_for_what_it_holds() -> None:
    names = {place(file) for file in FILES if {file.stem, *file.relative_to(HOME).parts[:-1]} & (NAMELESS | TAKEN)}
    assert not names


def test_nothing_below_jobs_prints() -> None:
    calls = {
        f"{place(file)}:{node.lineno}"
        for file in FILES
        if file.relative_to(HOME).parts[0] not in ("jobs", "tests")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert not calls


def test_the_arrow_and_the_doors_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_room_imports_the_door() -> None:
    """import-linter knows packages only, and the door is a module."""
    door = re.compile(rf"^\s*(from|import) {DOOR.stem}\b", re.MULTILINE)
    rooms = [file for file in FILES if file.relative_to(HOME).parts[0] in ROOMS]
    assert not [place(file) for file in rooms if door.search(file.read_text())]


def test_the_door_is_thin() -> None:
    """It has no way of its own to an engine, a rank or a cluster: it goes through the rooms."""
    imports = re.findall(r"^\s*(?:from|import) (\w+)", DOOR.read_text(), re.MULTILINE)
    assert {*imports} - {*sys.stdlib_module_names} == {"pandas", "configs", "jobs", "pipeline", "rewards"}


def doors_of_the_linter() -> dict[str, set[str]]:
    """By dependency the files that may import it; a room that may as a whole ends with a slash."""
    settings = tomllib.loads((HOME / "pyproject.toml").read_text())["tool"]["importlinter"]
    doors: dict[str, set[str]] = {}
    for contract in settings["contracts"]:
        if contract["type"] == "forbidden" and "ignore_imports" in contract:
            [dependency] = contract["forbidden_modules"]
            importers = {line.split(" -> ")[0] for line in contract["ignore_imports"]}
            assert {line.split(" -> ")[1] for line in contract["ignore_imports"]} == {dependency}
            free = set(settings["root_packages"]) - set(contract["source_modules"])
            doors[dependency] = {f"{name.replace('.', '/')}.py" for name in importers} | {f"{room}/" for room in free}
    return doors


def test_the_table_of_doors_is_the_linters_list() -> None:
    text = (HOME / "docs" / "architecture.md").read_text()
    table = text.partition("| dependency | its doors |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()]
    assert {name.strip(): set(re.findall(r"`([^`]+)`", doors)) for name, doors in rows} == doors_of_the_linter()
    assert all((HOME / door).exists() for doors in doors_of_the_linter().values() for door in doors)


def test_no_text_claims_to_be_the_only_importer() -> None:
    """Such a sentence goes stale with the next import; the linter's list, and the table made from it, do not."""
    claim = re.compile(r"only (file|module|place|one) that (imports|knows)|nowhere else", re.IGNORECASE)
    texts = [*FILES, *(HOME / "docs").rglob("*.md"), HOME / "README.md"]
    own = Path(__file__)
    assert not [place(text) for text in texts if text != own and claim.search(" ".join(text.read_text().split()))]


def test_what_drives_a_stage_starts_without_torch() -> None:
    """Ranks and engines have it; a stage's own process, and a run's, would wait seconds for what they never use."""
    stages = [f"pipeline.stages.{file.stem}" for file in (HOME / "pipeline" / "stages").glob("[a-z]*.py")]
    assert len(stages) >= 7
    program = f"import sys, pipeline.run.dry_run, {', '.join(stages)}; print({{'torch', 'vllm'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stdout + done.stderr
