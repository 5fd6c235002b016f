"""Write the checkpoints of a stage, and restore the newest one when it resumes.

`checkpoints/step-N/` holds the training state of all ranks, from which a run resumes; `best/` the model of the best
step; `hf/` that of the last step.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from configs.train import CheckpointConfig
from pipeline.disk.checksums import damage, write_checksums
from pipeline.disk.files import fsync, link, new_folder, read_json, write_atomic
from pipeline.disk.recorded import CHECKPOINTS
from pipeline.train.worker import TrainingRanks

_STATE_NAME = re.compile(r"step-(\d+)")

PENDING, CANDIDATE = "pending", "candidate"
"""Folders of a training state and of a model that were written before their step was done."""
WAIT_SHARE = 0.02
"""Share of a step that its end waits at most for a state that is being written."""
_BEST_FILE = "best.json"
"""Records the best step, and the name and value of the figure that selected it."""


def saved_states(stage_folder: Path) -> dict[int, Path]:
    """Return the folders of a stage's training states, by the step after which they were written."""
    folder = stage_folder / CHECKPOINTS
    matches = ((_STATE_NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]): path for match, path in matches if match}


def set_aside_damaged(stage_folder: Path, warn: Callable[[str], None]) -> None:
    """Rename damaged training states to `step-N.damaged`, so that the stage resumes from the newest intact one.

    `warn` is called with a line for each. Raises ValueError if all states are damaged; then none is renamed.
    """
    damaged: dict[int, str] = {}
    for step, state in sorted(saved_states(stage_folder).items(), reverse=True):
        problems = damage(state)
        if not problems:
            break
        damaged[step] = f"'{state}' is damaged ({'; '.join(problems)})"
    else:
        if damaged:
            remedy = f"restore these files, or remove '{stage_folder / CHECKPOINTS}' to train from the first step again"
            raise ValueError("\n".join([*damaged.values(), f"no training state of the stage is whole: {remedy}"]))
        return
    for damaged_step, sentence in damaged.items():
        state = stage_folder / CHECKPOINTS / f"step-{damaged_step}"
        aside = state.with_name(f"{state.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
        warn(f"{sentence}: set aside as {aside.name}, resumes from step {step}")


class Checkpoints:
    """The checkpoints of a policy in its stage's folder. `step` is the last finished step, 0 at the start; `pending` is
    that of the training state which is being written, if any.

    A training state is copied while the ranks hold it, and written beside the steps that follow, one at a time: it
    becomes the newest once it is whole and its step is done. A kill in between leaves the state before.

    Example:
        ranks.update(batch, denominator)
        checkpoints.write(step)
        report.step(step, metrics)
        checkpoints.done(step)
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        policy: TrainingRanks,
        *,
        last_step: int,
        is_candidate: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """is_candidate: True for a step whose policy may become the best one, since `offer` follows."""
        self.step = 0
        self.pending: int | None = None
        self._began = time.monotonic()  # the present step
        self._last_step, self._is_candidate = last_step, is_candidate
        self._stage_folder, self._bests = folder, folder / "bests"
        self._folder = folder / CHECKPOINTS
        self._config = config
        self._policy = policy

    def restore(self) -> int:
        """Load the newest checkpoint, if any, and return the step after which it was written, or 0."""
        states = saved_states(self._stage_folder)
        if states:
            self.step = max(states)
            self._policy.load(states[self.step])
        return self.step

    def write(self, step: int) -> None:
        """Write what is due after `step`: a checkpoint, a candidate for the best, the model as `hf/` after the last."""
        if step == self._last_step:  # first, since a run that resumes from the last checkpoint has no step to write it
            self._policy.save_hf(self._stage_folder / "hf")
        if self._is_candidate(step):
            self._policy.save_hf(self._bests / CANDIDATE / "hf")
        if step == self._last_step or step % self._config.every_steps == 0:
            self._finish(None)
            shutil.rmtree(self._folder / PENDING, ignore_errors=True)  # a killed writer's
            (self._folder / PENDING).mkdir(parents=True)
            self._policy.begin_save(self._folder / PENDING)
            self.pending = step

    def done(self, step: int) -> None:
        """Finish `step`: from now on its checkpoint, if one was due, may become the newest to resume from. That of the
        last step has become it when this returns."""
        self.step = step
        now = time.monotonic()
        self._finish(None if step == self._last_step else WAIT_SHARE * (now - self._began))
        self._began = now

    def _finish(self, patience: float | None) -> None:
        """Make the state that is being written the newest; not if the ranks need longer than `patience` seconds."""
        if self.pending is None or (checksums := self._policy.end_save(patience)) is None:
            return
        write_checksums(self._folder / PENDING, checksums)
        newest = self._folder / f"step-{self.pending}"
        (self._folder / PENDING).rename(newest)
        fsync(newest.parent)
        self.pending = None
        for _, old in sorted(saved_states(self._stage_folder).items())[: -self._config.keep]:
            shutil.rmtree(old)

    def offer(self, step: int, figure: str, value: float, *, lower_is_better: bool) -> None:
        """Keep the candidate of `step` as `best/hf` if its `value` is better than that of the current best.

        `best` is a link that is replaced atomically. Its previous folder is kept until the next replacement, so that a
        process that reads it can finish. A resumed run offers the same steps again and ends with the same best.
        """
        best, candidate = self._stage_folder / "best", self._bests / CANDIDATE
        if best.is_dir():
            current = read_json(best / _BEST_FILE, f"remove '{best}': then the best of the following steps is saved")
            gain = current["value"] - value if lower_is_better else value - current["value"]
            if current["figure"] == figure and gain <= 0:
                shutil.rmtree(candidate)
                return
        previous = best.resolve()
        with new_folder(self._bests / f"step-{step}") as partial:
            (candidate / "hf").rename(partial / "hf")
            write_atomic(partial / _BEST_FILE, json.dumps({"step": step, "figure": figure, "value": value}, indent=1))
        link(best, self._bests / f"step-{step}")
        for old in self._bests.iterdir():
            if old.resolve() not in (best.resolve(), previous):
                shutil.rmtree(old)
