"""Checkpoints of a reference that follows the policy (DeepSeek-R1 section 3.2.1, arXiv:2501.12948).

`reference/step-N` in the stage's folder is the policy after step N, in the format of `transformers`. It is written
before the training state of that step appears, so a resumed stage finds the reference that it had.
"""

import shutil
from pathlib import Path

from pipeline.train.checkpoints import saved_states
from pipeline.train.worker import TrainingRanks

_FOLDER = "reference"


def reference_step(step: int, every_steps: int | None) -> int:
    """Return the step whose policy is the reference in the step after `step`; 0 stands for the first weights."""
    return step - step % every_steps if every_steps else 0


def reference_checkpoint(folder: Path, model: Path, every_steps: int | None) -> Path:
    """Return the checkpoint of the reference with which the stage in `folder` starts or resumes.

    `model` has the first weights. Raises ValueError if the checkpoint is gone.
    """
    step = reference_step(max(saved_states(folder), default=0), every_steps)
    checkpoint = _checkpoint(folder, step) if step else model
    if not checkpoint.is_dir():
        raise ValueError(f"the reference '{checkpoint}' is gone; restore it from a copy, or run the stage anew")
    return checkpoint


def refresh_reference(
    policy: TrainingRanks, folder: Path, step: int, every_steps: int, *, pending: int | None = None
) -> None:
    """Let the reference become the policy after `step`, on the disk and then in the ranks.

    References that no training state of the stage needs are removed. `pending`: the step of one that is being written.
    """
    policy.save_hf(_checkpoint(folder, step))
    policy.refresh_reference()
    states = {*saved_states(folder), step, step if pending is None else pending}
    needed = {_checkpoint(folder, reference_step(state, every_steps)) for state in states}
    for checkpoint in (folder / _FOLDER).iterdir():
        if checkpoint not in needed:
            shutil.rmtree(checkpoint)


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / _FOLDER / f"step-{step}"
