"""Where a stage can be resumed from: `checkpoints/step-N/`, each the whole training state of all ranks."""

import re
import shutil
from pathlib import Path

from configs.train import CheckpointConfig
from pipeline.train.worker import Policy

NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of one policy in one stage's folder. `step` is the last step that is done, 0 at the start."""

    def __init__(self, folder: Path, config: CheckpointConfig, policy: Policy) -> None:
        self.step = 0
        self._stage_folder = folder
        self._folder = folder / "checkpoints"
        self._config = config
        self._policy = policy

    def restore(self) -> int:
        """Continue from the newest checkpoint, if there is one. Returns the step it was written after, or 0."""
        found = self._found()
        if found:
            self.step = max(found)
            self._policy.load(found[self.step])
        return self.step

    def done(self, step: int, *, last: bool) -> None:
        """`step` is done: write a checkpoint when one is due and, after the last step, the model as `hf/`."""
        self.step = step
        if last:  # before the checkpoint: with the last one on disk, a resumed run has no step left to write it after
            self._policy.save_hf(self._stage_folder / "hf")
        if last or step % self._config.every_steps == 0:
            self._policy.save(self._folder / f"step-{step}")
            for _, old in sorted(self._found().items())[: -self._config.keep]:
                shutil.rmtree(old)

    def _found(self) -> dict[int, Path]:
        if not self._folder.is_dir():
            return {}
        named = ((NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return {int(match[1]): path for match, path in named if match}
