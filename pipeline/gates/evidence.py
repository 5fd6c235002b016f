"""What a gate's decision rests on, item by item, from the files it keeps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.gates.kept import read_evaluation
from pipeline.gates.rules import lower_is_better


@dataclass(frozen=True, slots=True)
class Regression:
    """An item that the candidate does worse on; the records hold what was said, None where a suite keeps none."""

    item: str
    parent: float
    candidate: float
    before: Mapping[str, Any] | None
    now: Mapping[str, Any] | None


def regressions(folder: Path, figure: str, most: int) -> tuple[list[Regression], int]:
    """The worst of the items of `SUITE/FIGURE` on which a gate's candidate is worse than the parent, at most `most`,
    and how many there are; none where the figure has no items. `folder` is the gate's."""
    suite, _, name = figure.partition("/")
    before, now = (read_evaluation(folder / who)[suite].items.get(name, {}) for who in ("parent", "candidate"))
    sign = -1 if lower_is_better(figure) else 1
    gains = {item: sign * (now[item] - before[item]) for item in before.keys() & now.keys()}
    worse = sorted((item for item in gains if gains[item] < 0), key=lambda item: (gains[item], item))
    mode = "greedy" if name.endswith("greedy") else "sampled"
    said = [_records(folder / who / f"{suite}.jsonl", set(worse[:most]), mode) for who in ("parent", "candidate")]
    shown = [
        Regression(item, before[item], now[item], *(records.get(item) for records in said)) for item in worse[:most]
    ]
    return shown, len(worse)


def _records(file: Path, items: set[str], mode: str) -> dict[str, Mapping[str, Any]]:
    """Of each item one record, of `mode` where there is one."""
    if not file.is_file():
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            item = str(record.get("row", ""))
            if item in items and (item not in found or found[item].get("mode") != mode == record.get("mode")):
                found[item] = record
    return found
