"""Write the checkpoints of a stage, and restore the newest one when it resumes.

`checkpoints/step-N/` holds the training state of all ranks, from which a run resumes; `best/` the model of the best
step; `hf/` that of the last step.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from configs.train import CheckpointConfig
from pipeline.disk.checksums import damage
from pipeline.disk.files import link, new_folder, read_json, write_atomic
from pipeline.disk.recorded import CHECKPOINTS
from pipeline.train.worker import TrainingRanks

_STATE_NAME = re.compile(r"step-(\d+)")

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
    """The checkpoints of a policy in its stage's folder. `step` is the last finished step, 0 at the start."""

    def __init__(self, folder: Path, config: CheckpointConfig, policy: TrainingRanks) -> None:
        self.step = 0
        self._stage_folder = folder
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

    def done(self, step: int, *, last: bool) -> None:
        """Finish `step`: write a checkpoint if one is due, and the model as `hf/` after the last step."""
        self.step = step
        if last:  # before the checkpoint: a run that resumes from the last one has no step left to write `hf/`
            self._policy.save_hf(self._stage_folder / "hf")
        if last or step % self._config.every_steps == 0:
            self._policy.save(self._folder / f"step-{step}")
            for _, old in sorted(saved_states(self._stage_folder).items())[: -self._config.keep]:
                shutil.rmtree(old)

    def offer(self, step: int, figure: str, value: float, *, lower_is_better: bool) -> None:
        """Save the policy of `step` as `best/hf` if its `value` is better than that of the current best.

        `best` is a link that is replaced atomically. Its previous folder is kept until the next replacement, so that a
        process that reads it can finish. A resumed run offers the same steps again and ends with the same best.
        """
        best = self._stage_folder / "best"
        if best.is_dir():
            current = read_json(best / _BEST_FILE, f"remove '{best}': then the best of the following steps is saved")
            gain = current["value"] - value if lower_is_better else value - current["value"]
            if current["figure"] == figure and gain <= 0:
                return
        previous = best.resolve()
        with new_folder(self._stage_folder / "bests" / f"step-{step}") as partial:
            self._policy.save_hf(partial / "hf")
            write_atomic(partial / _BEST_FILE, json.dumps({"step": step, "figure": figure, "value": value}, indent=1))
        link(best, self._stage_folder / "bests" / f"step-{step}")
        for old in (self._stage_folder / "bests").iterdir():
            if old.resolve() not in (best.resolve(), previous):
                shutil.rmtree(old)
