"""Files behind addresses that `fsspec` reads: `s3://`, `gs://`, `az://`, `https://`, `file://`.

An object is fetched once into the folder that ALIGNYARD_CACHE names, and again after it has changed. Keys and endpoints
come from the environment, as the library of the file system takes them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import TqdmCallback

from pipeline.disk.files import new_folder

CHECKPOINT_FILES = (".json", ".jinja", ".model", ".txt", ".safetensors")
"""Endings of a checkpoint's files; others beside them are not fetched."""
_VERSION = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "size")
"""Entries of an object's description that change with its content; a file system has some of them."""


def is_address(path: str) -> bool:
    """Return whether `path` is an address, not a path of this machine."""
    return "://" in path


def remote_versions(address: str) -> dict[str, str]:
    """Return the objects of an address or a glob pattern, sorted, each with a text that changes with its content.

    Raises ValueError where there is none, or the file system can't be reached.

    Example:
        remote_versions("s3://corpus/part-*.jsonl")  # {"s3://corpus/part-0.jsonl": "size=71, ETag=..."}
    """
    system, path = _file_system(address)
    found = _asked(address, lambda: system.glob(path, detail=True))
    if not found:
        raise ValueError(f"no object fits '{address}'")
    return {system.unstrip_protocol(name): _version(found[name]) for name in sorted(found)}


def fetch_file(address: str, version: str) -> Path:
    """Return a copy of one object of `remote_versions` on this machine, fetched where it isn't there yet."""
    name = address.rpartition("/")[2]
    return _fetched({address: version}) / name


def fetch_checkpoint(address: str) -> Path:
    """Return the folder of a copy of the checkpoint at `address`. Raises ValueError where config.json is missing."""
    versions = remote_versions(address.rstrip("/") + "/*")
    if not any(name.endswith("/config.json") for name in versions):
        raise ValueError(f"'{address}' holds no checkpoint: config.json is missing")
    return _fetched({name: version for name, version in versions.items() if name.endswith(CHECKPOINT_FILES)})


def copy_folder(folder: Path, address: str, *, leaving: str) -> int:
    """Copy the files of `folder` and below to `address`, but for those in folders named `leaving`; return the number
    of files that were sent.

    A file of the same size that is not older stays as it is. The `config.json` of a folder goes last, so that a
    checkpoint whose copy was cut short has none. Raises ValueError where the file system refuses.
    """
    system, root = _file_system(address)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if leaving not in path.relative_to(folder).parts]
    there = (
        _asked(address, lambda: system.find(root, detail=True)) if _asked(address, lambda: system.exists(root)) else {}
    )
    sent = 0
    for file in sorted(files, key=lambda file: (file.name == "config.json", file)):
        place = f"{root.rstrip('/')}/{file.relative_to(folder).as_posix()}"
        status = file.stat()
        if place in there and there[place]["size"] == status.st_size:
            modified = _asked(address, lambda place=place: system.modified(place))
            if modified.timestamp() >= int(status.st_mtime):
                continue
        _asked(address, lambda place=place: system.makedirs(system._parent(place), exist_ok=True))
        _asked(address, lambda place=place, file=file: system.put_file(str(file), place))
        sent += 1
    return sent


def _fetched(versions: Mapping[str, str]) -> Path:
    """The folder of copies of these objects."""
    key = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("ALIGNYARD_CACHE", "~/.cache/alignyard")).expanduser()
    folder = cache / "remote" / key
    if folder.is_dir():
        return folder
    with new_folder(folder) as partial:
        for address in versions:
            system, path = _file_system(address)
            name = address.rpartition("/")[2]
            bar = TqdmCallback(tqdm_kwargs={"desc": name, "unit": "B", "unit_scale": True, "disable": None})
            _asked(address, lambda s=system, p=path, n=name, b=bar: s.get_file(p, str(partial / n), callback=b))
    return folder


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, without what it remembers of earlier listings, and the path there."""
    try:
        system, path = fsspec.url_to_fs(address)
        system.invalidate_cache()
        return system, path
    except (ImportError, ValueError) as error:
        raise ValueError(f"'{address}': {error}") from error


def _asked(address: str, question: Callable[[], Any]) -> Any:
    """Ask a file system, and name the address in its error."""
    try:
        return question()
    except Exception as error:  # the libraries of file systems have errors of their own
        raise ValueError(
            f"'{address}' can't be reached or was refused ({type(error).__name__}: {error}); check the address, the "
            "keys in the environment and the network"
        ) from error


def _version(info: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={info[name]}" for name in _VERSION if info.get(name) is not None)
