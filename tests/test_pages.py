"""Pages that name places in the code: the places exist, and tables that are searched by eye are sorted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.documentation import reference_pages
from configs.load import load_config
from configs.site import write_site
from configs.stages import Recipe
from tests.test_layout import room_graph

HOME = Path(__file__).parents[1]
CODE = re.compile(r"`([^`]+)`")
# Names of files that a run writes, of other projects' files and of files of the reader's own start otherwise.
ROOMS = ("configs/", "rewards/", "rollout/", "pipeline/", "jobs/", "tests/", "docs/")
PAGES = [
    *(HOME / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(page for page in (HOME / "docs").rglob("*.md") if page.name != "configs.md"),
]
FILE = re.compile(r"(?<![\w/.])(?:configs|rewards|rollout|pipeline|jobs|tests)/[\w/]+\.py\b")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def glossary() -> dict[str, str]:
    """The last column of each row, where the word stands in the code, by the word."""
    rows = [line.strip("|").split(" | ") for line in (HOME / "docs" / "glossary.md").read_text().splitlines()]
    return {row[0].strip(): row[-1] for row in rows if len(row) == 4 and row[0].strip() != "word here"}


def test_the_glossary_is_sorted_and_complete() -> None:
    words = list(glossary())
    assert len(words) >= 40
    assert words == sorted(words, key=str.lower)


@pytest.mark.parametrize("word", glossary())
def test_the_glossary_leads_to_the_code(word: str) -> None:
    """A row names one or more paths, and names that stand in one of these files."""
    tokens = CODE.findall(glossary()[word])
    places = [HOME / token for token in tokens if "/" in token]
    assert places and all(place.exists() for place in places)
    text = "".join(place.read_text() for place in places if place.is_file())
    assert not [name for name in tokens if "/" not in name and not re.search(rf"\b(class|def) {name}\b", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    """Paths in backticks, and files of ours in drawings and examples."""
    text = page.read_text()
    tokens = [token for token in CODE.findall(text) if token.startswith(ROOMS) and re.fullmatch(r"[\w./-]+", token)]
    assert not [path for path in [*tokens, *FILE.findall(text)] if not (HOME / path).exists()]


def rooms_of_the_page() -> list[str]:
    """The rooms of pipeline/ in the order of their table, from the ground up; a file without its ending."""
    text = (HOME / "docs" / "architecture.md").read_text()
    table = text.partition("## The rooms of `pipeline/`")[2].partition("\n## ")[0]
    return [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)]


def room(place: Path) -> str:
    """The room of pipeline/ that a path below it belongs to."""
    return place.parts[0].removesuffix(".py")


def test_the_table_names_every_room_of_the_pipeline() -> None:
    files = [file.relative_to(HOME / "pipeline") for file in (HOME / "pipeline").rglob("[a-z]*.py")]
    assert {room(file) for file in files} == set(rooms_of_the_page())


def test_rooms_import_only_from_rows_above() -> None:
    order = rooms_of_the_page()
    arrows = [(name, other) for name, others in room_graph().items() for other in others]
    assert not [f"{name} -> {other}" for name, other in arrows if order.index(other) > order.index(name)]


def test_the_functions_and_tests_of_the_equations_exist() -> None:
    """`grpo.mix.mix` is defined in pipeline/grpo/mix.py; a test's name, or its start before "...", in a test file."""
    tokens = set(CODE.findall((HOME / "docs" / "algorithm.md").read_text()))
    tests = set(
        re.findall(r"def (test_\w+)", "".join(file.read_text() for file in (HOME / "tests").rglob("test_*.py")))
    )
    starts = {token.removesuffix("...") for token in tokens if re.fullmatch(r"test_\w+(\.\.\.)?", token)}
    assert not {start for start in starts if not any(name.startswith(start) for name in tests)}
    rooms = "|".join(folder.name for folder in (HOME / "pipeline").iterdir() if (folder / "__init__.py").is_file())
    functions = {token for token in tokens if re.fullmatch(rf"({rooms})(\.\w+){{2,}}", token)}
    assert functions and not {function for function in functions if not is_defined(function)}


def is_defined(function: str) -> bool:
    """True where each name of `room.file.name` or `room.file.Class.attribute` is defined in that file."""
    folder, file, *names = function.split(".")
    text = (HOME / "pipeline" / folder / f"{file}.py").read_text()
    return all(re.search(rf"\b(?:class|def) {name}\b|^ +{name}:", text, re.MULTILINE) for name in names)


FIRST_HOUR = HOME / "docs" / "first_hour_gpu.md"


@pytest.mark.parametrize("page", [FIRST_HOUR, FIRST_HOUR.with_name("troubleshooting.md")], ids=lambda page: page.stem)
def test_the_messages_that_a_page_explains_are_ours(page: Path) -> None:
    """Each part of an explained message, between dots, stands in the code."""
    code = "".join(file.read_text() for room in ROOMS[:5] for file in (HOME / room).rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message over several lines
    code = re.sub(r"{[^{}]*}", "...", code)
    rows = [line.split(" | ") for line in page.read_text().splitlines() if " | Alignyard | " in line]
    parts = [part.strip() for row in rows for text in CODE.findall(row[0]) for part in text.split("...")]
    assert len(rows) >= 10
    assert not [part for part in parts if part not in code]


def test_the_runs_of_the_first_hour_are_valid() -> None:
    commands = re.findall(r"^alignyard run (\S+)([^#\n]*)", FIRST_HOUR.read_text(), re.MULTILINE)
    assert len(commands) >= 8
    for recipe, arguments in commands:
        overrides = [word for word in arguments.split() if "=" in word]
        load_config(recipe, overrides, Recipe)


def test_the_sites_links_lead_somewhere(tmp_path: Path) -> None:
    """Links of its pages, and of its order. `make site` holds anchors, too, and that each page has a place."""
    write_site(HOME, tmp_path / "pages")
    order = re.findall(r"([\w/]+\.md)$", (HOME / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(order) == len({*order}) and {f"reference/{name}.md" for name in reference_pages()} < {*order}
    assert not [page for page in order if not (tmp_path / "pages" / page).is_file()]
    broken = {
        (page.name, target)
        for page in (tmp_path / "pages").rglob("*.md")
        for target in LINK.findall(page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    }
    assert not broken


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    generator = HOME / ".venv-docs"
    if not generator.is_dir():
        pytest.skip("`make site` installs the generator")
    write_site(HOME, tmp_path / "pages")
    settings = (
        (HOME / "mkdocs.yml")
        .read_text()
        .replace("docs_dir: build/", "docs_dir: ")
        .replace("site_dir: build/", "site_dir: ")
    )
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "mkdocs", "build"]
    environment = os.environ | {"PYTHONPATH": str(generator), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning_rate" in (tmp_path / "site" / "reference" / "sft.html").read_text()
