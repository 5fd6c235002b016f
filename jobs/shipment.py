"""Files that travel with a run to a cluster: plug-ins, data and templates that its recipe names by relative paths.

The terminal packs them into the working directory of the conductor's Ray job, which Ray carries to the head. The
conductor unpacks them into the run's folder, the one place that all nodes share, and stages start there. They don't
stay in Ray's package, which stands on `PYTHONPATH` and is gone after the run
(docs/decisions/0031-files-travel-with-a-run.md).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from configs.base import Settings, walk
from configs.data import FileSource
from configs.rewards import RewardSpec
from configs.stages import Recipe
from pipeline.disk.files import new_folder
from pipeline.disk.remote import is_address

TRAVEL_MIB = 100
"""Most that travels; the smallest files first."""
FILES = "files"
"""Folder of the files, in the package and in the run's folder."""
_MIB = 2**20
_FOLDER_MARKS = ("config.json", "adapter_config.json", "dataset_dict.json", "state.json")
"""Files by which a folder is known for a checkpoint, adapters or a data set."""


class Shipment(Settings):
    """The files of a run, as the terminal found them."""

    working_directory: Path
    """Absolute folder on the terminal's machine that the recipe's paths start from."""
    start: str = "."
    """The same folder within the package, below which a path like `../data/x.jsonl` leads as well."""
    too_large: dict[str, int] = Field(default_factory=dict[str, int])
    """Bytes of what did not travel, by its path in the recipe."""

    def unpack(self, package: Path, folder: Path) -> Path:
        """Put the files into the run's `folder`, in the place of those of an earlier start, and links to what did not
        travel; return the folder to start stages in.

        Raises ValueError for a file that did not travel and is not on this machine either.
        """
        with new_folder(folder / FILES) as partial:
            if (package / FILES).is_dir():
                shutil.copytree(package / FILES, partial, dirs_exist_ok=True)
            start = partial / self.start
            start.mkdir(parents=True, exist_ok=True)
            for name, size in self.too_large.items():
                original = self.working_directory / name
                if not original.exists():
                    raise ValueError(
                        f"'{name}' is too large to travel with the run ({size / _MIB:.0f} MiB of {TRAVEL_MIB} for all "
                        "files); put it on storage that the cluster's nodes share, and give its absolute path there"
                    )
                link = Path(os.path.normpath(start / name))
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(original)
        return Path(os.path.normpath(folder / FILES / self.start))


def pack_files(recipe: Recipe, package: Path) -> Shipment:
    """Copy what `recipe` names by paths relative to the working directory into the folder `package`.

    Absolute paths are the cluster's own. Of a plug-in go the modules that it imports from its folder as well.
    """
    here = Path.cwd()
    sizes = {Path(os.path.normpath(here / path)): _size(path) for path in _named(recipe)}
    root = Path(os.path.commonpath([here, *(path.parent for path in sizes)]))
    total, too_large = 0, dict[str, int]()
    for path, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        total += size
        if total > TRAVEL_MIB * _MIB:
            too_large[os.path.relpath(path, here)] = size
            continue
        place = package / FILES / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, place)
    return Shipment(working_directory=here, start=os.path.relpath(here, root), too_large=too_large)


def _named(recipe: Recipe) -> Iterator[Path]:
    """Yield the files and folders that the stages name by relative paths, and that exist here."""
    for _, node in walk(recipe.stages):
        if isinstance(node, RewardSpec):
            yield from _plugin(node)
        elif isinstance(node, FileSource):
            yield from _relative_matches(node)
        elif isinstance(node, str) and node and not Path(node).is_absolute():
            path = Path(node)
            with suppress(OSError):  # a text too long for a name
                if path.is_file() or any((path / mark).is_file() for mark in _FOLDER_MARKS):
                    yield path


def _plugin(spec: RewardSpec) -> Iterator[Path]:
    from pipeline.run.sources import HOME, plugin_sources
    from rewards.plugins.names import locate, source_file

    with suppress(ValueError):  # the run's check names what is wrong
        place = locate(spec.name)
        if place.is_file and not Path(place.where).expanduser().is_absolute():
            yield Path(place.where)
            yield from (file for file in plugin_sources(source_file(spec)).values() if not file.is_relative_to(HOME))


def _relative_matches(source: FileSource) -> Iterator[Path]:
    from pipeline.data.rows import source_files

    for pattern in source.paths:
        with suppress(ValueError):
            if not (is_address(pattern) or Path(pattern).expanduser().is_absolute()):
                yield from source_files(source.model_copy(update={"paths": [pattern]}))


def _size(path: Path) -> int:
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)
