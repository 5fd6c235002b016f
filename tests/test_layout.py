"""The plan of the source: rooms and floors of pipeline/, no circle of imports, names defined once, plain docstrings."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.test_architecture import DOOR, FILES, HOME, ROOMS, place

MAX_ROOMS, MAX_FLOORS = 17, 9
MAX_LINES = 46_800
"""Lines of source in the five rooms and the door. A change that needs more says in its commit what it adds; one that
frees lines lowers the number."""

CONTRACT = {"run", "launch", "check", "main", "app"}
"""Names that every stage (pipeline.run.stage), every program or every verb (jobs.cli) defines."""

HEADLESS = re.compile(r"(What|Who|Whose|Of|By|Whether|Those|How|That|Which|Where|When) ")
"""First words of a docstring that is no sentence about the thing it documents."""

SOURCES = [file for file in FILES if file.relative_to(HOME).parts[0] in (*ROOMS, DOOR.name)]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in SOURCES if file != DOOR}


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports at any depth, those named in a string (`module` or `module:name`, for
    `import_module`) included."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            if names[0] in MODULES:
                names = names[:-1]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.partition(":")[0]]
        yield from (name for name in names if name in MODULES)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Nodes that reach themselves, each with one way round."""
    found: list[list[str]] = []
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                follow(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        follow(node, [])
    return found


def file_graph() -> dict[str, set[str]]:
    return {name: {other for other in imports(file) if other != name} for name, file in MODULES.items()}


def room_graph() -> dict[str, set[str]]:
    """The rooms of pipeline/ and those that each imports from."""
    rooms: dict[str, set[str]] = {}
    for name, others in file_graph().items():
        if name.startswith("pipeline."):
            room = name.split(".")[1]
            rooms.setdefault(room, set()).update(
                other.split(".")[1] for other in others if other.startswith("pipeline.") and other.split(".")[1] != room
            )
    return rooms


def test_no_files_import_in_a_circle() -> None:
    # A judge is named as text in rewards/, two floors below: it is imported in the judging process alone.
    graph = {
        name: {other for other in others if not (name.startswith("rewards.") and other.startswith("pipeline."))}
        for name, others in file_graph().items()
    }
    assert not circles(graph)


def test_pipeline_has_few_rooms_on_few_floors() -> None:
    rooms = room_graph()
    assert not circles(rooms)

    @cache
    def floor(room: str) -> int:
        return 1 + max(map(floor, rooms.get(room, ())), default=0)

    assert len(rooms) <= MAX_ROOMS and max(map(floor, rooms)) <= MAX_FLOORS


def test_a_circle_is_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def top_level_names(file: Path) -> Iterator[str]:
    """The public functions, classes and values that a file defines."""
    for node in ast.parse(file.read_text()).body:
        targets: list[ast.expr] = []
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign():
                targets = [part for t in node.targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
            case ast.AnnAssign():
                targets = [node.target]
            case _:
                pass
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_a_public_name_is_defined_once() -> None:
    """The door repeats names of verbs, which it calls the same things."""
    places: dict[str, list[str]] = {}
    for file in [file for file in SOURCES if file != DOOR]:
        for name in {*top_level_names(file)} - CONTRACT:
            if not name.startswith("_"):
                places.setdefault(name, []).append(place(file))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def docstrings(file: Path) -> Iterator[str]:
    """The texts that document modules, classes, functions, fields and constants: every string that is a statement."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.strip()


def test_docstrings_begin_with_a_verb_or_the_thing() -> None:
    headless = [
        f"{place(file)}: {text.splitlines()[0]}"
        for file in SOURCES
        for text in docstrings(file)
        if HEADLESS.match(text)
    ]
    assert not headless


def test_the_source_stays_small() -> None:
    assert sum(len(file.read_text().splitlines()) for file in SOURCES) <= MAX_LINES
