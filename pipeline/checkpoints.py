"""What stays of a policy: `checkpoints/step-N/`, each the whole training state of all ranks, to resume from; the best
step's model as `best/`; the last step's as `hf/`.
"""

import json
import re
import shutil
from pathlib import Path

from configs.train import CheckpointConfig
from pipeline.folder import link, new_folder, write_atomic
from pipeline.train.worker import Policy

NAME = re.compile(r"step-(\d+)")

BEST = "best.json"
"""Which step the best one is, and by what."""


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

    def offer(self, step: int, figure: str, value: float, *, lower_is_better: bool) -> None:
        """Keep the policy of `step` as `best/hf` if its `value` is better than the kept one's; an equal one is not.

        `best` is a link that is replaced in one step, and the folder it pointed at before is left until the next time:
        who is reading it reads on. A resumed run offers the same steps again and ends with the same best.
        """
        best = self._stage_folder / "best"
        if best.is_dir():
            kept = json.loads((best / BEST).read_text(encoding="utf-8"))
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

    def _found(self) -> dict[int, Path]:
        if not self._folder.is_dir():
            return {}
        named = ((NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return {int(match[1]): path for match, path in named if match}
