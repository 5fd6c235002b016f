"""A stage's series as a resumed run must repeat it."""

import json
from pathlib import Path

MACHINE = ("second", "memory/")
"""Parts of the names of what depends on the machine."""


def series(file: Path, *apart: str) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl` without what depends on the machine, and names that contain one of `apart`."""
    left_out = (*MACHINE, *apart)
    return [
        {name: value for name, value in json.loads(line).items() if not any(part in name for part in left_out)}
        for line in file.read_text().splitlines()
    ]
