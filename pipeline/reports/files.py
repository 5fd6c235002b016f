"""What a stage's folder holds for people to look at, and how it is read while the stage still writes."""

import json
import math
from pathlib import Path
from typing import Any

from pipeline.disk.files import read_json_or_none
from pipeline.disk.recorded import METRICS

ROLLOUTS = "rollouts"
EXPERT_LOAD = "expert_load.json"
"""Of the newest step that the page shows: tokens sent to each expert, by the name of its layer's gate."""

Row = dict[str, float]


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a stage's `metrics.jsonl`, each with its `step`; none where there is no file.

    A torn last line, which a killed run leaves, is left out. Raises ValueError for any other line that is not JSON.
    """
    rows = read_json_lines(folder / METRICS)
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, but a torn last one; none where there is no file.

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


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file that is written as a whole; empty where it is missing or damaged, so that a page shows
    the rest."""
    return read_json_or_none(file) or {}


def duration(seconds: float) -> str:
    """`45s`, `3m12s`, `2h05m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
