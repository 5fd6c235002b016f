"""Readers of the files in a stage's folder that are made for people, also while the stage still writes them."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.disk.recorded import METRICS

ROLLOUTS = "rollouts"
EXPERT_LOAD = "expert_load.json"
"""Tokens sent to each expert in the newest step that the page shows, by the name of its layer's router."""

MetricsRow = Mapping[str, float]


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a stage's `metrics.jsonl`, each with its `step`; empty without that file. A null is NaN.

    Raises ValueError for a damaged line, other than a torn last one.
    """
    rows = read_json_lines(folder / METRICS)
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; empty without that file. A torn last line, as a killed run leaves it, is
    left out.

    Raises ValueError for any other line that is not JSON.
    """
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if not any(lines[number:]):
                break
            raise ValueError(f"{file}:{number}: not JSON ({error}); remove the line to go on") from error
    return records


def data_hashes(lineage: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key, file and SHA-256 of each file that a stage read; for a source without files, the hash of its settings."""
    for key, hashes in lineage["data"].items():
        if isinstance(hashes, str):
            yield key, "(its settings)", hashes
        else:
            yield from ((key, name, sha256) for name, sha256 in hashes.items())


def weights_hash(model: Mapping[str, Any]) -> str:
    """SHA-256 of the first weights file of a model in `lineage.json`; empty for a model without one."""
    return next((sha256 for name, sha256 in model["files"].items() if name != "config.json"), "")


def duration(seconds: float) -> str:
    """`45s`, `3m12s`, `2h05m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
