"""Write files and folders so that they appear complete or not at all, even after a power cut.

Bytes are synced to the disk before a file is renamed to its final name.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast


def write_atomic(file: Path, text: str) -> None:
    """Write UTF-8 `text` to a hidden sibling of `file`, then rename it, so that a reader never sees a part of it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    partial.replace(file)
    fsync(file.parent)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk: about 5 ms for a small file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until every file in `folder` and below is on the disk."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, name) for name in files), Path(parent)):
            if not path.is_symlink():
                fsync(path)


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises ValueError naming the file, the fault and the `remedy`."""
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
    """Read a file that holds a JSON object; None if it is missing or damaged."""
    try:
        return read_json(file, "")
    except ValueError:
        return None


def write_json_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically; values without a JSON type are written as text.

    Raises ValueError for a float that is not finite.
    """
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False, default=str) for record in records]
    text = "".join(f"{line}\n" for line in lines)
    # A lone surrogate has no UTF-8 form; backslashreplace writes it as its JSON escape.
    write_atomic(file, text.encode("utf-8", "backslashreplace").decode("utf-8"))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write into; rename it to `folder` when the block ends, remove it when the block raises.

    An existing `folder` stays until the new one is complete. Only one process may write at a time; it first removes the
    leftovers of a killed one.

    Example:
        with new_folder(Path("hf")) as partial:
            model.save_pretrained(partial)
    """
    partial, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_tree(partial)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        fsync(folder.parent)
    finally:
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)


def link(path: Path, target: Path) -> None:
    """Make `path` a relative link to the folder `target`, replacing an older link in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)
    partial.replace(path)
    fsync(path.parent)
