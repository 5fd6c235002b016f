"""Checkpoints of a stage: the best one, before and after a kill and while it is replaced, and damaged states, which are
never resumed from."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from configs.train import CheckpointConfig
from pipeline.disk.checksums import checksum, write_checksums
from pipeline.train.checkpoints import Checkpoints, saved_states, set_aside_damaged


class Policy:
    """Weights in two files that must be of one step."""

    step, slow, writing = 0, False, False

    def __init__(self) -> None:
        self.patience: list[float | None] = []

    def save_hf(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            (folder / name).write_text(f"{self.step}" * 1000)

    def begin_save(self, folder: Path) -> None:
        assert not self.writing, "one state at a time"
        self.save_hf(folder)
        self.writing = True

    def end_save(self, patience: float | None) -> dict[str, str] | None:
        """Written in time, unless the disk is slow."""
        self.patience.append(patience)
        self.writing = self.writing and self.slow and patience is not None
        return None if self.writing else {"one": ""}


def checkpoints(folder: Path, policy: Policy) -> Checkpoints:
    config = CheckpointConfig(every_steps=100)
    return Checkpoints(folder, config, cast(Any, policy), last_step=100, is_candidate=lambda _: True)


def offer(folder: Path, values: dict[int, float], *, lower_is_better: bool = False) -> int:
    """Offer the steps; the best one's."""
    policy = Policy()
    for step, value in values.items():
        policy.step = step
        stage = checkpoints(folder, policy)
        stage.write(step)
        policy.step = -1  # the ranks may be asleep by now: what is kept was written before
        stage.offer(step, "s/f", value, lower_is_better=lower_is_better)
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


def test_a_state_is_resumed_from_once_its_step_is_done(tmp_path: Path) -> None:
    """It is written while the ranks hold it; the rest of the step may still fail, and is repeated then."""
    policy = Policy()
    stage = Checkpoints(tmp_path, CheckpointConfig(every_steps=2, keep=1), cast(Any, policy), last_step=5)
    for step in range(1, 6):
        policy.step, before = step, saved_states(tmp_path)
        stage.write(step)
        policy.step = -1
        assert saved_states(tmp_path) == before and (tmp_path / "hf").exists() == (step == 5)
        stage.done(step)
        assert list(saved_states(tmp_path)) == {1: [], 2: [2], 3: [2], 4: [4], 5: [5]}[step]
    assert (saved_states(tmp_path)[5] / "one").read_text() == "5" * 1000


def test_a_state_is_written_beside_the_steps_that_follow_and_waited_for_before_the_next_and_at_the_end(
    tmp_path: Path,
) -> None:
    policy = Policy()
    policy.slow = True
    stage = Checkpoints(tmp_path, CheckpointConfig(every_steps=2, keep=2), cast(Any, policy), last_step=5)
    for step in range(1, 6):
        policy.step = step
        stage.write(step)
        stage.done(step)
        assert sorted(saved_states(tmp_path)) == {1: [], 2: [], 3: [], 4: [2], 5: [4, 5]}[step]
        assert step == 1 or (tmp_path / "checkpoints" / "pending").exists() == (step < 5)
    assert (saved_states(tmp_path)[4] / "two").read_text() == "4" * 1000
    waits = [patience for patience in policy.patience if patience is not None]
    assert len(waits) == 3 and max(waits) < 0.02 * 60  # of steps that take no time: a share of them


def test_what_a_kill_left_half_written_is_no_state_and_is_written_anew(tmp_path: Path) -> None:
    policy = Policy()
    policy.slow = True
    checkpoints(tmp_path, policy).write(100)
    again = Policy()
    again.step = 7
    stage = checkpoints(tmp_path, again)
    assert saved_states(tmp_path) == {}
    stage.write(100)
    stage.done(100)
    assert (saved_states(tmp_path)[100] / "one").read_text() == "7" * 1000


def states(stage: Path, *steps: int) -> dict[int, Path]:
    """Whole training states after these steps."""
    for step in steps:
        folder = stage / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "step.json").write_text(json.dumps({"step": step}))
        for layer in range(3):
            (folder / f"layer-{layer}.safetensors").write_bytes(bytes([step, layer]) * 5000)
        write_checksums(folder, {file.name: checksum(file) for file in folder.iterdir()})
    return dict(sorted(saved_states(stage).items()))


def test_whole_states_stay_as_they_are(tmp_path: Path) -> None:
    notes: list[str] = []
    set_aside_damaged(tmp_path, notes.append)
    before = states(tmp_path, 3, 6)
    set_aside_damaged(tmp_path, notes.append)
    assert saved_states(tmp_path) == before and not notes


def spoil(how: str, state: Path) -> str:
    """Damages one file of a state; its name."""
    name = {"another step": "step.json", "no checksums": "checksums.json", "cut checksums": "checksums.json"}.get(
        how, "layer-2.safetensors"
    )
    content = bytearray((state / name).read_bytes())
    match how:
        case "flipped bit":
            content[7777] ^= 4
        case "another step":
            content = content.replace(b"6", b"600")
        case "truncated" | "cut checksums":
            del content[len(content) // 2 :]
        case "zeros":
            content[-4096:] = bytes(4096)
        case "empty":
            content.clear()
    (state / name).write_bytes(content)
    if how in ("missing", "no checksums"):
        (state / name).unlink()
    return name


DAMAGES = [
    *("flipped bit", "zeros", "truncated", "empty", "missing"),
    *("another step", "no checksums", "cut checksums"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_state_is_named_by_file_and_the_one_before_is_taken(tmp_path: Path, how: str) -> None:
    saved = states(tmp_path, 3, 6)
    whole, damaged = saved[3], saved[6]
    name, notes = spoil(how, damaged), list[str]()
    set_aside_damaged(tmp_path, notes.append)
    assert saved_states(tmp_path) == {3: whole}
    assert len(notes) == 1 and name in notes[0] and notes[0].endswith("resumes from step 3")
    assert (tmp_path / "checkpoints" / "step-6.damaged").is_dir()  # nothing is lost


def test_every_damaged_state_before_a_whole_one_is_set_aside(tmp_path: Path) -> None:
    _, *newer = states(tmp_path, 2, 4, 6).values()
    for state in newer:
        spoil("flipped bit", state)
    notes: list[str] = []
    set_aside_damaged(tmp_path, notes.append)
    assert list(saved_states(tmp_path)) == [2] and len(notes) == 2


def test_where_no_state_is_whole_the_stage_is_refused_and_keeps_them(tmp_path: Path) -> None:
    for how, state in zip(("missing", "truncated"), states(tmp_path, 3, 6).values(), strict=True):
        spoil(how, state)
    with pytest.raises(ValueError, match=r"(?s)step-6.*step-3.*to train from the first step again"):
        set_aside_damaged(tmp_path, lambda _: None)
    assert sorted(saved_states(tmp_path)) == [3, 6]


def test_a_second_damage_of_the_same_step_replaces_what_was_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        spoil("empty", states(tmp_path, *({3, 6} - set(saved_states(tmp_path))))[6])
        set_aside_damaged(tmp_path, lambda _: None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-6.damaged"]
