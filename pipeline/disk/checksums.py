"""Checksums of a training state's files (XXH3, 128 bits), which detect damage after writing but no forgery."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from pipeline.disk.files import read_json, write_atomic

CHECKSUMS = "checksums.json"
_CHUNK_BYTES = 2**20
_THREADS = 8


def checksum(file: Path) -> str:
    """Compute the checksum of a file's bytes."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a state's files by name."""
    write_atomic(folder / CHECKSUMS, json.dumps(dict(checksums), indent=1, sort_keys=True))


def damage(folder: Path) -> list[str]:
    """Describe the damage to a training state, one sentence for each file; empty for an intact one."""
    try:
        recorded = read_json(folder / CHECKSUMS, "its files can't be checked")
    except ValueError as error:
        return [str(error)]

    def problem(name: str) -> str:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        return "" if checksum(file) == recorded[name] else f"{name} is not what was written: its checksum differs"

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = list(pool.map(problem, sorted(recorded)))
    return list(filter(None, problems)) if recorded else [f"{CHECKSUMS} names no file"]
