"""The source files that a module is made of: its own, and by the import statements in them those of its package.

They are found by reading, not by running: an import inside a function counts as well as one at the top. Other
packages are identified by their recorded versions.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
ROOMS = frozenset({"configs", "rewards", "rollout", "pipeline", "jobs"})


@dataclass(frozen=True, slots=True)
class Root:
    """A folder that modules are imported from, and the names of the packages in it to follow; None follows all."""

    folder: Path
    packages: frozenset[str] | None

    def files(self, module: str) -> Iterator[Path]:
        """The files of the packages that a module is in, then its own; files that don't exist are left out."""
        package, *below = module.split(".")
        if self.packages is not None and package not in self.packages:
            return
        place = self.folder
        for name in (package, *below):
            place = place / name
            for file in (place / "__init__.py", place.with_suffix(".py")):
                if file.is_file():
                    yield file


def sources(*modules: str, home: Path = HOME) -> dict[str, Path]:
    """The files of our `modules` and of all of ours that they import, by their places below `home`, the folder of the
    rooms."""
    root = Root(home, ROOMS)
    return _closure((file for module in modules for file in root.files(module)), [root])


def sources_of_plugin(file: Path, module: str = "") -> dict[str, Path]:
    """The files of a plug-in's module and of the modules that it imports from its own package and from ours, by place.
    `module` is its name where it is installed; without one, modules beside `file` count as its package.

    Raises ValueError where one of them is not Python.
    """
    file, ours = file.resolve(), Root(HOME, ROOMS)
    folder = file.parents[module.count(".") + (file.stem == "__init__")] if module else file.parent
    theirs = Root(folder, frozenset({module.partition(".")[0]}) if module else None)
    return _closure(iter([file, *theirs.files(module)]), [theirs, ours])


def _closure(first: Iterator[Path], roots: list[Root]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    queue = list(first)
    while queue:
        file = queue.pop()
        if file in files.values():
            continue
        folder = next((root.folder for root in roots if file.is_relative_to(root.folder)), file.parent)
        files[str(file.relative_to(folder))] = file
        if file.suffix == ".py":
            for level, module in _imports(file, file.stat().st_mtime_ns):
                # A relative import starts at the file's own package, or so many levels above.
                places = [Root(file.parents[level - 1], None)] if level else roots
                queue += (each for root in places for each in root.files(module))
    return files


@lru_cache(maxsize=1024)
def _imports(file: Path, _: int) -> list[tuple[int, str]]:
    """(dots before it, name) of every module that a file imports something from, or that it may: `from a import b`
    takes b from a, or is the module a.b."""
    imports: list[tuple[int, str]] = []
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            imports += [(node.level, f"{base}{alias.name}".removesuffix(".*")) for alias in node.names]
    return imports


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}; its imports belong to the run's lineage") from error
