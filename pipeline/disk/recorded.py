"""Read the records of a stage from its folder: settings, figures, lineage, and changes of its inputs since it started.

Imports no torch, so that commands which only read a run start fast.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from configs.environment import from_environment
from pipeline.disk.files import read_json, read_json_or_none
from pipeline.disk.hashes import checkpoint_hashes, file_hash

CONFIG, LINEAGE = "config.json", "lineage.json"
FIGURES = "figures.json"
"""Written when a stage is done: the results of an evaluation, or the last metrics of a training."""
METRICS, DECISION, CHECKPOINTS = "metrics.jsonl", "decision.json", "checkpoints"
EVALUATION = "evaluation"
"""Folder with the records of a last evaluation on comparisons."""
REFERENCE = "reference"
"""Folder with the log-probabilities of a frozen reference."""
RESULT_PATTERNS = (FIGURES, METRICS, DECISION, f"{CHECKPOINTS}/step-*", "answers/*.jsonl")
"""Patterns of files and folders that show that a stage has a result; empty files don't count."""
ABSENT = "(absent)"


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings that a stage was started with. Raises ValueError if the file is damaged."""
    return read_json(folder / CONFIG, _remedy(folder))


def read_figures(folder: Path) -> dict[str, float] | None:
    """Read the figures of a finished stage; None for an unfinished one. A damaged file gives None too: the stage then
    resumes from its newest checkpoint and writes the file again."""
    return read_json_or_none(folder / FIGURES)


def begun(folder: Path) -> bool:
    """Return whether a stage has a result: a step, a training state, answers, a decision or figures. Until then another
    configuration may use its folder."""
    results = (path for pattern in RESULT_PATTERNS for path in folder.glob(pattern))
    return any(path.is_dir() or path.stat().st_size for path in results)


def set_aside(folder: Path) -> Path | None:
    """Move a stage's folder to `before-N/NAME` beside it, with all its results, and return the new place; None where
    there is none. The stage then begins anew."""
    if not folder.is_dir():
        return None
    places = (folder.parent / f"before-{number}" / folder.name for number in count(1))
    place = next(place for place in places if not place.exists())
    place.parent.mkdir(exist_ok=True)
    return folder.rename(place)


def read_lineage(folder: Path) -> dict[str, Any]:
    """Read the lineage of a stage. Raises ValueError if the file is damaged, or of a version that did not record every
    model."""
    lineage = read_json(folder / LINEAGE, _remedy(folder))
    if "models" not in lineage:
        raise ValueError(f"'{folder / LINEAGE}' was written by an earlier version; give the run another name")
    return lineage


def changes(folder: Path, *, content: bool) -> list[str]:
    """Describe the inputs of a stage that have changed since it started: parents that ran again and, with `content`,
    files of models and data, which are then read whole."""
    lineage = read_lineage(folder)
    changed: list[str] = []
    for parent in lineage["parents"]:
        file = folder / parent["folder"] / LINEAGE
        if not file.is_file():
            changed.append(f"{parent['key']}: {parent['folder']} is gone")
        elif file_hash(file) != parent["lineage"]:
            changed.append(f"{parent['key']}: {parent['folder']} was run again since")
    if content:
        for key, model in lineage["models"].items():
            now = checkpoint_hashes(folder / from_environment(model["folder"]))
            changed += [f"{key}: {name} is not what it was" for name in differences(model["files"], now)]
        for key, files in lineage["data"].items():
            for name, recorded in files.items() if isinstance(files, dict) else ():
                now = _content(folder, from_environment(name))
                if now is None:
                    changed.append(f"{key}: {name} is gone")
                elif now != recorded:
                    changed.append(f"{key}: {name} is not what it was")
    return changed


def _content(folder: Path, name: str) -> str | None:
    """Hash a file that the stage in `folder` recorded, or return the version of an object at an address; None where it
    is gone."""
    from pipeline.disk.remote import is_address, remote_versions  # imports the libraries of file systems

    if not is_address(name):
        return file_hash(folder / name) if (folder / name).is_file() else None
    try:
        return remote_versions(name).get(name)
    except ValueError:
        return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the keys with different values, sorted."""
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key, ABSENT) != now.get(key, ABSENT)]


def _remedy(folder: Path) -> str:
    return f"restore it from a copy, or remove '{folder}' to run the stage again"
