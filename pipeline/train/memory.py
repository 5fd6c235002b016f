"""A rank's peak of memory in each step, and the longest micro-batch behind it.

On a GPU the peak is that of its tensors. On the CPU it is the growth of the process since before its model was built,
which includes freed blocks that the C library keeps. `alignyard plan --measured RUN` compares it with the prediction.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.data.trees import MicroBatch
from pipeline.train.spec import LONGEST, PEAK

PROC_STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepMemory:
    """Measures each step of a rank. Construct it before the model."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens = 0
        # Some containers' kernels have no clear_refs, without which a peak cannot be reset.
        self._measures = device.type != "cpu" or os.access(CLEAR_REFS, os.W_OK)
        self._before = resident("VmRSS") if device.type == "cpu" else 0

    def begin(self, batch: Sequence[MicroBatch]) -> None:
        """Reset the peak before the first passes of a step, and note the length of its micro-batches."""
        if not self._measures:
            return
        if self._tokens == 0 and self._device.type == "cpu":
            CLEAR_REFS.write_text("5", encoding="ascii")
        elif self._tokens == 0:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._tokens = max(self._tokens, *(len(row.token_ids_T) for row in batch))

    def figures(self) -> dict[str, float]:
        """Return the peak in GiB and the tokens of the longest micro-batch of the step that ends here.

        Empty where the kernel does not report a peak.
        """
        if not self._measures:
            return {}
        tokens, self._tokens = self._tokens, 0
        if self._device.type == "cpu":
            peak = resident("VmHWM") - self._before
        else:
            peak = torch.cuda.max_memory_allocated(self._device)
        return {PEAK: peak / 2**30, LONGEST: float(tokens)}


def resident(name: str) -> int:
    """Resident bytes of this process: `VmRSS` for the present, `VmHWM` for the peak."""
    lines = PROC_STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
