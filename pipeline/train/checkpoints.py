"""What stays of a policy: `checkpoints/step-N/`, each the whole training state of all ranks, to resume from; the best
step's model as `best/`; the last step's as `hf/`.
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

NAME = re.compile(r"step-(\d+)")

BEST = "best.json"
"""Records the best step, the figure that it was chosen by, and its value."""


def saved_states(stage_folder: Path) -> dict[int, Path]:
    """The training states of a stage, by the step each was written after."""
    folder = stage_folder / CHECKPOINTS
    matches = ((NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]): path for match, path in matches if match}


def set_aside_damaged(stage_folder: Path, tell: Callable[[str], None]) -> None:
    """Rename the training states of a stage that are newer than its newest whole one to `step-N.damaged`, so that it
    resumes from that one. `tell` gets one line for each.

    Raises ValueError where there are states and none of them is whole; then all stay where they are.
    """
    damaged: dict[int, str] = {}
    for step, state in sorted(saved_states(stage_folder).items(), reverse=True):
        wrong = damage(state)
        if not wrong:
            break
        damaged[step] = f"'{state}' is damaged ({'; '.join(wrong)})"
    else:
        if damaged:
            remedy = f"restore these files, or remove '{stage_folder / CHECKPOINTS}' to train from the first step again"
            raise ValueError("\n".join([*damaged.values(), f"no training state of the stage is whole: {remedy}"]))
        return
    for other, sentence in damaged.items():
        state = stage_folder / CHECKPOINTS / f"step-{other}"
        aside = state.with_name(f"{state.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
        tell(f"{sentence}: set aside as {aside.name}, resumes from step {step}")


class Checkpoints:
    """The checkpoints of one policy in one stage's folder. `step` is the last step that is done, 0 at the start."""

    def __init__(self, folder: Path, config: CheckpointConfig, policy: TrainingRanks) -> None:
        self.step = 0
        self._stage_folder = folder
        self._folder = folder / CHECKPOINTS
        self._config = config
        self._policy = policy

    def restore(self) -> int:
        """Continue from the newest checkpoint, if there is one. Returns the step it was written after, or 0."""
        states = saved_states(self._stage_folder)
        if states:
            self.step = max(states)
            self._policy.load(states[self.step])
        return self.step

    def done(self, step: int, *, last: bool) -> None:
        """`step` is done: write a checkpoint when one is due and, after the last step, the model as `hf/`."""
        self.step = step
        if last:  # before the checkpoint: with the last one on disk, a resumed run has no step left to write it after
            self._policy.save_hf(self._stage_folder / "hf")
        if last or step % self._config.every_steps == 0:
            self._policy.save(self._folder / f"step-{step}")
            for _, old in sorted(saved_states(self._stage_folder).items())[: -self._config.keep]:
                shutil.rmtree(old)

    def offer(self, step: int, figure: str, value: float, *, lower_is_better: bool) -> None:
        """Keep the policy of `step` as `best/hf` if its `value` is better than the kept one's; an equal one is not.

        `best` is a link that is replaced in one step, and the folder it pointed at before is left until the next time,
        so that a process that reads it can finish. A resumed run offers the same steps again and ends with the same
        best.
        """
        best = self._stage_folder / "best"
        if best.is_dir():
            kept = read_json(best / BEST, f"remove '{best}': the best of the steps to come is kept then")
            gain = kept["value"] - value if lower_is_better else value - kept["value"]
            if kept["figure"] == figure and gain <= 0:
                return
        replaced = best.resolve()
        with new_folder(self._stage_folder / "bests" / f"step-{step}") as partial:
            self._policy.save_hf(partial / "hf")
            write_atomic(partial / BEST, json.dumps({"step": step, "figure": figure, "value": value}, indent=1))
        link(best, self._stage_folder / "bests" / f"step-{step}")
        for old in (self._stage_folder / "bests").iterdir():
            if old.resolve() not in (best.resolve(), replaced):
                shutil.rmtree(old)
