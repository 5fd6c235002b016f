"""The items behind a gate's decision, from the files in its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.gates.cache import read_evaluation
from pipeline.gates.rules import lower_is_better


@dataclass(frozen=True, slots=True)
class Regression:
    """An item on which the candidate does worse, with its values and both completions' records.

    A record is None where the suite keeps none.
    """

    item: str
    parent: float
    candidate: float
    before: Mapping[str, Any] | None
    now: Mapping[str, Any] | None


def regressions(folder: Path, figure: str, most: int) -> tuple[list[Regression], int]:
    """Return the items of `SUITE/FIGURE` that got worse, the worst first and at most `most`, and their number.

    folder: the gate's. A figure without items has no regressions.
    """
    suite, _, name = figure.partition("/")
    sides = [folder / side for side in ("parent", "candidate")]
    before, now = (read_evaluation(side)[suite].items.get(name, {}) for side in sides)
    sign = -1 if lower_is_better(figure) else 1
    gains = {item: sign * (now[item] - before[item]) for item in before.keys() & now.keys()}
    worse = sorted((item for item in gains if gains[item] < 0), key=lambda item: (gains[item], item))
    mode = "greedy" if name.endswith("greedy") else "sampled"
    records = [_records(side / f"{suite}.jsonl", set(worse[:most]), mode) for side in sides]
    shown = [Regression(item, before[item], now[item], *(of.get(item) for of in records)) for item in worse[:most]]
    return shown, len(worse)


def _records(file: Path, items: set[str], mode: str) -> dict[str, Mapping[str, Any]]:
    """Return one record of each item, of `mode` where there is one."""
    if not file.is_file():
        return {}
    records: dict[str, Mapping[str, Any]] = {}
    with file.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            item = str(record.get("row", ""))
            if item in items and (item not in records or records[item].get("mode") != mode == record.get("mode")):
                records[item] = record
    return records
