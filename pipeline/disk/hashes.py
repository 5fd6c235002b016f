"""Hashes of what a stage starts from: files, checkpoints, data sets.

A hash is of every byte: sizes and times alone prove nothing. Since a checkpoint may have hundreds of gigabytes, hashes
of large files are remembered beside them (`.sha256.json`) and hold for as long as size and modification time do.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pipeline.disk.files import read_json_or_none, write_atomic

MODEL_FILES = ("config.json", "*.safetensors")
DATASET_FILES = ("dataset_dict.json", "*/*.arrow")
"""Files that say what a data set saved to disk holds; its other files also say when and how it was made."""

REMEMBERED = ".sha256.json"
LARGE = 2**28
"""Bytes from which on a file's hash is worth remembering: below it takes a fraction of a second."""
SETTLED_SECONDS = 10
"""A file changed more recently may change again within one tick of its modification time, so it isn't remembered."""
THREADS = 8


def text_hash(text: str) -> str:
    """SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file. Raises ValueError where there is none."""
    if not file.is_file():
        raise ValueError(f"'{file}' is no file; its hash belongs to the run's lineage")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """By name the SHA-256 of a checkpoint's configuration and weights."""
    return _hashes(folder, MODEL_FILES)


def dataset_hashes(folder: Path) -> dict[str, str]:
    """By name the SHA-256 of the files that hold the rows of a data set saved to disk."""
    return _hashes(folder, DATASET_FILES)


def _hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    names = [str(file.relative_to(folder)) for file in files]
    remembered = read_json_or_none(folder / REMEMBERED) or {}

    def hashed(name: str) -> str:
        known = remembered.get(name)
        return known["sha256"] if known and known["state"] == _state(folder / name) else file_hash(folder / name)

    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(names, pool.map(hashed, names), strict=True))
    worth = {
        name: {"state": _state(folder / name), "sha256": hashes[name]} for name in names if _settled(folder / name)
    }
    if worth != remembered:
        with suppress(OSError):  # a folder that can't be written to is hashed anew each time
            write_atomic(folder / REMEMBERED, json.dumps(worth, indent=1, sort_keys=True))
    return hashes


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _settled(file: Path) -> bool:
    found = file.stat()
    return found.st_size >= LARGE and time.time() - found.st_mtime > SETTLED_SECONDS
