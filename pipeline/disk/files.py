"""Files and folders that appear whole or not at all, even after a power cut.

Bytes are synced to the disk before the file is renamed to its place, so that no name stands for lost bytes.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast


def write_atomic(file: Path, text: str) -> None:
    """Writes UTF-8 `text` to a hidden sibling of `file`, then renames it, so that no reader sees half of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk. It takes about 5 ms for a small file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until every file in `folder` and below is on the disk."""
    for place, _, files in os.walk(folder):
        for path in (*(Path(place, name) for name in files), Path(place)):
            if not path.is_symlink():
                sync(path)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file that was written as a whole. Raises ValueError naming the file, what is wrong with it
    and the `remedy`."""
    if not file.is_file():
        raise ValueError(f"'{file}' is missing; {remedy}")
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"'{file}' is {'damaged' if text else 'empty'} ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{file}' is damaged (no JSON object); {remedy}")
    return cast(dict[str, Any], value)


def read_json_or_none(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file that was written as a whole; None where it is missing or damaged."""
    try:
        return read_json(file, "")
    except ValueError:
        return None


def write_json_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, as `write_atomic` does; what JSON has no type for is written as its text.

    Raises ValueError for a float that is not finite.
    """
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) for record in records]
    text = "".join(f"{line}\n" for line in lines)
    # Half a surrogate pair has no UTF-8; the backslash form that stands in for it is its JSON escape.
    write_atomic(file, text.encode("utf-8", "backslashreplace").decode("utf-8"))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden sibling of `folder` to write into, renamed to `folder` when the block ends and removed when it raises.

    An existing `folder` is replaced; it stays as it is until the new one is complete. One writer at a time: what a
    killed writer left behind is cleared by the next.
    """
    partial, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)


def link(place: Path, target: Path) -> None:
    """Make `place` a relative link to the folder `target`; whatever link stood there is replaced in one step, so that a
    reader finds the old folder or the new one."""
    partial = place.with_name(f".{place.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, place.parent), target_is_directory=True)
    partial.replace(place)
    sync(place.parent)
