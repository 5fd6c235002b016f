"""The source files of rewards: a module's own, and those that it imports from its package and from ours.

Imports are found by parsing, not by running, so that an import within a function counts too. Other packages are
identified by their recorded versions.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from configs.rewards import RewardSpec
from pipeline.disk.hashes import file_hash, text_hash
from rewards.plugins.names import FACTORIES, locate, source_file

HOME = Path(__file__).resolve().parents[2]
ROOMS = frozenset({"configs", "rewards", "rollout", "pipeline", "jobs"})

JUDGING_MODULES = ("rewards.pool.workers", "pipeline.grpo.mix")
"""Modules that pass tasks to every reward, and mix the verdicts."""


@dataclass(frozen=True, slots=True)
class Root:
    """A folder that modules are imported from, and the packages in it to follow; None follows all."""

    folder: Path
    packages: frozenset[str] | None

    def files(self, module: str) -> Iterator[Path]:
        """Yield the `__init__.py` of each package above a module and the module's file, where they exist."""
        package, *below = module.split(".")
        if self.packages is not None and package not in self.packages:
            return
        path = self.folder
        for name in (package, *below):
            path = path / name
            for file in (path / "__init__.py", path.with_suffix(".py")):
                if file.is_file():
                    yield file


def reward_files(spec: RewardSpec) -> dict[str, Path]:
    """The source files of a reward, by path: its module, the modules that it imports from its own package and from
    ours, and JUDGING_MODULES."""
    place = locate(spec.name)
    if spec.name in FACTORIES:
        return module_sources(place.where, *JUDGING_MODULES)
    return module_sources(*JUDGING_MODULES) | plugin_sources(source_file(spec), "" if place.is_file else place.where)


def source_hash(files: Mapping[str, Path]) -> str:
    """Hash files together with their paths."""
    return text_hash("".join(f"{file_hash(files[name])} {name}\n" for name in sorted(files)))


def module_sources(*modules: str, home: Path = HOME) -> dict[str, Path]:
    """Files of our `modules` and of all that they import from our packages, by their path below `home`."""
    root = Root(home, ROOMS)
    return _closure((file for module in modules for file in root.files(module)), [root])


def plugin_sources(file: Path, module: str = "") -> dict[str, Path]:
    """Files of a plug-in and of all that it imports from its own package and from ours, by path.

    module: name of an installed plug-in; without one, the modules beside `file` are its package. Raises ValueError for
    a file that is not Python.
    """
    file, ours = file.resolve(), Root(HOME, ROOMS)
    folder = file.parents[module.count(".") + (file.stem == "__init__")] if module else file.parent
    theirs = Root(folder, frozenset({module.partition(".")[0]}) if module else None)
    return _closure(iter([file, *theirs.files(module)]), [theirs, ours])


def _closure(start: Iterator[Path], roots: list[Root]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    queue = list(start)
    while queue:
        file = queue.pop()
        if file in files.values():
            continue
        folder = next((root.folder for root in roots if file.is_relative_to(root.folder)), file.parent)
        files[str(file.relative_to(folder))] = file
        if file.suffix == ".py":
            for level, module in _imports(file, file.stat().st_mtime_ns):
                # A relative import starts at the file's own package, or `level` - 1 packages above it.
                import_roots = [Root(file.parents[level - 1], None)] if level else roots
                queue += (path for root in import_roots for path in root.files(module))
    return files


@lru_cache(maxsize=1024)
def _imports(file: Path, _mtime_ns: int) -> list[tuple[int, str]]:
    """List the modules that a file may import, as (leading dots, name): `from a import b` yields a.b, which stands for
    b of module a as well."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}; its imports belong to the run's lineage") from error
    imports: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            imports += [(node.level, f"{base}{alias.name}".removesuffix(".*")) for alias in node.names]
    return imports
