"""What `pipeline.lineage` has recorded of a stage, read again: what it was made from, and whether that is still so.

Light to import: who only looks at a run needs no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.hashes import checkpoint_hashes, file_hash

CONFIG, LINEAGE = "config.json", "lineage.json"
ABSENT = "(absent)"


def read_lineage(folder: Path) -> dict[str, Any]:
    """What is recorded of a stage. Raises ValueError where it was recorded before lineage named every model."""
    lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    if "models" not in lineage:
        raise ValueError(f"'{folder / LINEAGE}' was written by an earlier version; give the run another name")
    return lineage


def changes(folder: Path, *, content: bool) -> list[str]:
    """What has changed, in words, since a stage started from it: parents that were run again, and where `content` is
    asked for, which reads them whole, the files of its models and data."""
    lineage = read_lineage(folder)
    found: list[str] = []
    for parent in lineage["parents"]:
        file = folder / parent["folder"] / LINEAGE
        if not file.is_file():
            found.append(f"{parent['key']}: {parent['folder']} is gone")
        elif file_hash(file) != parent["lineage"]:
            found.append(f"{parent['key']}: {parent['folder']} was run again since")
    if content:
        for key, model in lineage["models"].items():
            now = checkpoint_hashes(folder / model["folder"])
            found += [f"{key}: {name} is not what it was" for name in differences(model["files"], now)]
        for key, files in lineage["data"].items():
            for name, recorded in files.items() if isinstance(files, dict) else ():
                file = folder / name
                if not file.is_file():
                    found.append(f"{key}: {name} is gone")
                elif file_hash(file) != recorded:
                    found.append(f"{key}: {name} is not what it was")
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values are not the same, sorted."""
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key, ABSENT) != now.get(key, ABSENT)]
