"""Records of a stage, read from its folder: its settings, figures and lineage, and whether its inputs have changed.

Light to import, without torch, for commands that only look at a run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.disk.files import read_json, read_json_or_none
from pipeline.disk.hashes import checkpoint_hashes, file_hash

CONFIG, LINEAGE = "config.json", "lineage.json"
FIGURES = "figures.json"
"""Written when a stage is done: an evaluation's results, or a training's last metrics."""
METRICS, DECISION, CHECKPOINTS = "metrics.jsonl", "decision.json", "checkpoints"
RESULT_PATTERNS = (FIGURES, METRICS, DECISION, f"{CHECKPOINTS}/step-*", "answers/*.jsonl")
"""Files and folders that show that a stage has a result; an empty file doesn't."""
ABSENT = "(absent)"


def read_config(folder: Path) -> dict[str, Any]:
    """The settings that a stage was started with. Raises ValueError where the file is damaged."""
    return read_json(folder / CONFIG, _remedy(folder))


def read_figures(folder: Path) -> dict[str, float] | None:
    """The figures of a stage that is done; None where it is not. A damaged file counts as none: the stage goes on from
    its newest checkpoint and writes it again."""
    return read_json_or_none(folder / FIGURES)


def begun(folder: Path) -> bool:
    """Return whether a stage has a result: a step, a training state, answers, a decision or its figures. Until then
    its folder may be taken over by another configuration."""
    results = (path for pattern in RESULT_PATTERNS for path in folder.glob(pattern))
    return any(path.is_dir() or path.stat().st_size for path in results)


def read_lineage(folder: Path) -> dict[str, Any]:
    """The lineage recorded for a stage. Raises ValueError where the file is damaged, or was written before lineage
    named every model."""
    lineage = read_json(folder / LINEAGE, _remedy(folder))
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


def _remedy(folder: Path) -> str:
    return f"restore it from a copy, or remove '{folder}' to run the stage again"
