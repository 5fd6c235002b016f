"""Checksums of a training state, which show whether its files have changed since they were written.

They are XXH3 with 128 bits. They detect damage by a disk, by memory or by hand; only a signature would detect forgery.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from pipeline.disk.files import read_json, write_atomic

CHECKSUMS = "checksums.json"
CHUNK_BYTES = 2**20
THREADS = 8


def checksum(file: Path) -> str:
    """The checksum of a file's bytes."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Writes the checksum of every file of the state by its name."""
    write_atomic(folder / CHECKSUMS, json.dumps(dict(checksums), indent=1, sort_keys=True))


def damage(folder: Path) -> list[str]:
    """The damage to the files of a training state, one sentence a file; empty where it is whole."""
    try:
        recorded = read_json(folder / CHECKSUMS, "its files can't be checked")
    except ValueError as error:
        return [str(error)]

    def examine(name: str) -> str:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        return "" if checksum(file) == recorded[name] else f"{name} is not what was written: its checksum differs"

    with ThreadPoolExecutor(THREADS) as pool:
        sentences = list(pool.map(examine, sorted(recorded)))
    return [sentence for sentence in sentences if sentence] if recorded else [f"{CHECKSUMS} names no file"]
