"""SHA-256 of a stage's inputs: files, checkpoints, data sets.

Hashes cover every byte. Those of large files, which may have hundreds of gigabytes, are cached beside them in
`.sha256.json` and reused while size and modification time stay the same.
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
"""Files with the rows of a data set saved to disk; the others also depend on the time and way of its making."""

CACHE = ".sha256.json"
LARGE = 2**28
"""Smallest size in bytes of a file whose hash is cached; smaller ones take a fraction of a second."""
SETTLED_SECONDS = 10
"""Smallest age of a cached file: a younger one may change again within one tick of its modification time."""
_THREADS = 8


def text_hash(text: str) -> str:
    """Hash text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_hash(file: Path) -> str:
    """Hash a file. Raises ValueError if it does not exist."""
    if not file.is_file():
        raise ValueError(f"'{file}' is no file; its hash belongs to the run's lineage")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """Hash a checkpoint's configuration and weights, by file name."""
    return _hashes(folder, MODEL_FILES)


def dataset_hashes(folder: Path) -> dict[str, str]:
    """Hash the files with the rows of a data set saved to disk, by file name."""
    return _hashes(folder, DATASET_FILES)


def _hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    names = [str(file.relative_to(folder)) for file in files]
    cached = read_json_or_none(folder / CACHE) or {}

    def hash_of(name: str) -> str:
        entry = cached.get(name)
        return entry["sha256"] if entry and entry["state"] == _state(folder / name) else file_hash(folder / name)

    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = dict(zip(names, pool.map(hash_of, names), strict=True))
    cacheable = {
        name: {"state": _state(folder / name), "sha256": hashes[name]} for name in names if _is_cacheable(folder / name)
    }
    if cacheable != cached:
        with suppress(OSError):  # a read-only folder is hashed anew each time
            write_atomic(folder / CACHE, json.dumps(cacheable, indent=1, sort_keys=True))
    return hashes


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_cacheable(file: Path) -> bool:
    status = file.stat()
    return status.st_size >= LARGE and time.time() - status.st_mtime > SETTLED_SECONDS
