"""The most memory that a rank took in a step, measured and as the planner predicts it.

On a GPU it is what its tensors took. On the CPU it is what the process grew by since before there was a model, which
counts freed blocks that the C library keeps; docs/planner.md says how far that is from the prediction.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.data.trees import MicroBatch
from pipeline.planner.architecture import Architecture, architecture_of, as_reward_model
from pipeline.planner.devices import DEVICES, GIB
from pipeline.planner.memory import TrainLayout, step_working, total, train_state
from pipeline.train.spec import PEAK, TrainSpec

PREDICTED = "memory/predicted_gib"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepMemory:
    """Figures of a rank's memory; made before its model is."""

    def __init__(self, spec: TrainSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._model = _countable(spec)
        self._tokens = 0
        self._measures = device.type != "cpu" or os.access(RESET, os.W_OK)  # some containers' kernels have no such file
        self._before = resident("VmRSS") if device.type == "cpu" else 0

    def begin(self, batch: Sequence[MicroBatch]) -> None:
        """Before the passes of a part of a step."""
        if not self._measures:
            return
        if self._tokens == 0 and self._device.type == "cpu":
            RESET.write_text("5", encoding="ascii")  # the peak starts anew
        elif self._tokens == 0:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._tokens = max(self._tokens, *(len(row.token_ids_T) for row in batch))

    def figures(self) -> dict[str, float]:
        """At the end of a step: nothing where it can't be measured, no prediction of what the planner does not plan
        (docs/planner.md)."""
        if not self._measures:
            return {}
        tokens, self._tokens = self._tokens, 0
        if self._device.type == "cpu":
            peak = resident("VmHWM") - self._before
        else:
            peak = torch.cuda.max_memory_allocated(self._device)
        predicted = {} if self._model is None else {PREDICTED: self._predicted(self._model, tokens) / GIB}
        return {PEAK: peak / GIB} | predicted

    def _predicted(self, model: Architecture, tokens: int) -> float:
        spec, cpu = self._spec, self._device.type == "cpu"
        layout = replace(TrainLayout.of(spec.trainer, spec.optimizer.moments), micro_batch_tokens=tokens)
        state = total(*train_state(model, layout, spec.dtype, reference=spec.with_reference)[: 1 + cpu])
        working = step_working(model, layout, spec.dtype, longest=0, lean=cpu and spec.dtype == "float32")
        return state + total(working) + (DEVICES["cpu"].runtime if cpu else 0)


def _countable(spec: TrainSpec) -> Architecture | None:
    if spec.mtp or spec.trainer.fp8:
        return None
    try:
        model = architecture_of(str(spec.model))
    except ValueError:  # a family that the planner can't count is trained all the same
        return None
    return as_reward_model(model) if spec.is_reward_model else model


def resident(name: str) -> int:
    """Bytes: VmRSS those of now, VmHWM the most there were."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
