"""The wheel: it holds what the package reads, and works where there is no checkout."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.settings import TINY_SFT
from tests.test_architecture import DOOR, FILES, HOME, ROOMS

PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text())
DOCS = "share/doc/alignyard"
NOT_CODE = {"__pycache__", ".pytest_cache"}
PARTS_OF = {
    "annotated_types": "pydantic",
    "pydantic_core": "pydantic",
    "markupsafe": "jinja2",
    "latex2sympy2_extended": "math-verify",
}
"""Modules that come with another package and are part of its interface."""
PEERS = {"trl"}
"""Imported by a benchmark that installs it first."""


def files_of_the_rooms() -> set[str]:
    """Every file of the rooms, by its path from the root."""
    files = (file for room in ROOMS for file in (HOME / room).rglob("*") if file.is_file())
    return {str(file.relative_to(HOME)) for file in files if not NOT_CODE & {*file.parts}}


def test_every_data_file_of_the_rooms_is_packaged() -> None:
    patterns = [
        f"{room}/{pattern}"
        for room, listed in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in listed
    ]
    data = {file for file in files_of_the_rooms() if not file.endswith(".py")}
    assert len(data) > 50
    assert not {file for file in data if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {file.parent for file in FILES if file.relative_to(HOME).parts[0] in ROOMS}
    assert not {str(folder) for folder in folders if not (folder / "__init__.py").is_file()}


def imported_packages() -> Iterator[tuple[str, Path]]:
    for file in FILES:
        if file.relative_to(HOME).parts[0] not in ROOMS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], file) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0], file


def test_what_the_code_imports_is_a_dependency() -> None:
    requirements = [
        *PROJECT["project"]["dependencies"],
        *(line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}  # pyright: ignore
    providers = packages_distributions()
    undeclared = {
        name: str(file)
        for name, file in imported_packages()
        if name not in {*ROOMS, *sys.stdlib_module_names, *PEERS}
        and PARTS_OF.get(name) not in declared
        and not declared & {provider.lower().replace("_", "-") for provider in providers.get(name, [name])}
    }
    assert not undeclared


def test_pages_that_messages_name_exist() -> None:
    """`alignyard docs` shows them where there is no checkout."""
    named = {
        (page, str(file.relative_to(HOME)))
        for file in FILES
        if file.relative_to(HOME).parts[0] in ROOMS
        for page in re.findall(r"\bdocs/\w+\.md", file.read_text())
    }
    assert named and not {(page, file) for page, file in named if not (HOME / page).is_file()}


def test_the_version_is_the_changelogs_newest() -> None:
    newest = re.search(r"^## ([\d.]+)", (HOME / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (HOME / "CITATION.cff").read_text(), re.MULTILINE)
    assert newest and cited
    assert newest[1] == cited[1] == PROJECT["project"]["version"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the source, so that nothing that an earlier build left can get in."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in (*ROOMS, "docs"):
        shutil.copytree(HOME / folder, source / folder, ignore=shutil.ignore_patterns(*NOT_CODE))
    for file in HOME.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(dist), str(source)], check=True, timeout=300)
    [built] = dist.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_rooms_and_the_pages_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"alignyard-{PROJECT['project']['version']}-py3-none-any.whl"
    data = f"{wheel.name.removesuffix('-py3-none-any.whl')}.data/data/{DOCS}/"
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    pages = {f"{data}{page.name}" for page in (HOME / "docs").glob("*.md")}
    assert inside == files_of_the_rooms() | {DOOR.name} | pages


@pytest.fixture(scope="session")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new environment with the wheel; its other packages are those of this environment, whose way to
    the checkout, a .pth file, Python reads in its own folder only."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    [packages] = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # has alignyard, perhaps
    subprocess.run([*pip, str(wheel)], env=environment, check=True, timeout=300)
    (packages / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.ranks
def test_the_wheel_works_in_an_empty_folder_without_the_checkout(elsewhere: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(elsewhere / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    path = "import sys, alignyard, jobs; print(*sys.path, alignyard.__file__, *jobs.__path__, sep='\\n')"
    places = [Path(line) for line in run("python", "-c", path).splitlines() if line]
    assert not [place for place in places if place.is_relative_to(HOME) and ".venv" not in place.parts]
    assert places[-1] == places[-2].with_name("jobs") and places[-1].is_relative_to(elsewhere.parent)
    assert run("alignyard", "--version") == f"alignyard {PROJECT['project']['version']}\n"
    assert "run" in run("alignyard", "list")
    assert "gate_preference" in run("alignyard", "run", "demo", "--dry-run")
    assert "sft" in run("alignyard", "docs") and "assistant" in run("alignyard", "docs", "docs/sft.md")
    assert "math" in run("alignyard", "reward", "list")
    (tmp_path / "tiny.yaml").write_text(TINY_SFT)
    assert "figures.json" in run("alignyard", "sft", "tiny.yaml")
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
    assert "tiny" in run("alignyard", "list")
