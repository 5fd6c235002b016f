"""The best checkpoint of a stage: which one it is, before and after a kill, and that it can be read at any time."""

import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from configs.train import CheckpointConfig
from pipeline.checkpoints import Checkpoints


class Policy:
    """Weights in two files that must be of one step."""

    step = 0

    def save_hf(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("one", "two"):
            (folder / name).write_text(f"{self.step}" * 1000)


def checkpoints(folder: Path, policy: Policy) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(), cast(Any, policy))


def offer(folder: Path, values: dict[int, float], *, lower_is_better: bool = False) -> int:
    """Offer the steps; the best one's."""
    policy = Policy()
    for step, value in values.items():
        policy.step = step
        checkpoints(folder, policy).offer(step, "s/f", value, lower_is_better=lower_is_better)
    best = json.loads((folder / "best" / "best.json").read_text())
    assert (folder / "best" / "hf" / "two").read_text() == f"{best['step']}" * 1000
    assert best["value"] == values.get(best["step"], best["value"]) and best["figure"] == "s/f"
    return best["step"]


def test_the_best_is_the_first_of_the_highest_or_lowest(tmp_path: Path) -> None:
    assert offer(tmp_path / "up", {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.3}) == 4
    assert offer(tmp_path / "down", {2: 0.5, 4: 0.1, 6: 0.1, 8: 0.3}, lower_is_better=True) == 4
    assert sorted(path.name for path in (tmp_path / "up" / "bests").iterdir()) == ["step-2", "step-4"]


@pytest.mark.parametrize("killed_after", [2, 4, 6])
def test_a_resumed_stage_ends_with_the_same_best(tmp_path: Path, killed_after: int) -> None:
    values = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.6, 10: 0.2}
    offer(tmp_path, {step: value for step, value in values.items() if step <= killed_after})
    assert offer(tmp_path, values) == 8  # from the start, or from any checkpoint before


def test_who_reads_the_best_reads_on_while_it_is_replaced(tmp_path: Path) -> None:
    offer(tmp_path, {1: 0.1})
    reading = (tmp_path / "best").resolve()  # as whoever loads a model does once, before its files
    offer(tmp_path, {2: 0.2})
    assert {(reading / "hf" / name).read_text() for name in ("one", "two")} == {"1" * 1000}


def test_there_is_a_best_at_every_moment_of_its_replacement(tmp_path: Path) -> None:
    offer(tmp_path, {1: 0.01})
    stop, faults = threading.Event(), list[str]()

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads((tmp_path / "best" / "best.json").read_text())
            except (OSError, ValueError) as error:
                faults.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 60):
        offer(tmp_path, {step: step / 100})
    stop.set()
    reader.join(timeout=30)
    assert not faults
