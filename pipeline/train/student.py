"""The training engine of one rank of a student, beside the frozen teachers that it is distilled from.

A rank has one teacher in memory at a time, in the reference's place. Only the teacher's last hidden states of the
trained tokens are kept, in the host's memory; its logits are rebuilt through its head, chunk by chunk, where the loss
reads them (DeepSeek-V4 section 5, arXiv:2606.19348).
"""

import gc
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.data.trees import MicroBatch
from pipeline.models.logprobs import TeacherTokens
from pipeline.train.build import build_frozen, destroy_frozen
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import BatchSums, TrainSpec
from pipeline.train.state import gathered
from rollout.device import DeviceState, needs


class StudentEngine(TrainEngine):
    """A TrainEngine whose loss may read a teacher.

    Example:

        engine.load_teacher("math")
        engine.teach(rows)
        sums = engine.forward_backward(rows, denominator)
        figures = engine.optim_step()
    """

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__(spec)
        self._teacher, self._checked = "", set[str]()
        self._taught: deque[TeacherTokens] = deque()

    @needs(DeviceState.AWAKE)
    def load_teacher(self, name: str) -> None:
        """Let the teacher `name` take the reference's place, unless it has it; the one before is freed first.

        Every rank takes part. Raises ValueError for a teacher whose log-probabilities can't be computed exactly.
        """
        if name == self._teacher:
            return
        if self.reference is not None:
            destroy_frozen(self.reference)
        self.reference, self._teacher = None, ""
        self._residence.replace_reference(None)
        gc.collect()  # modules and their hooks refer to each other
        frozen, checks = self.spec.teachers[name], name not in self._checked
        self.reference = build_frozen(frozen, self.spec, self.device, checks=checks)
        self._residence.replace_reference(self.reference)
        self._teacher = name
        self._checked.add(name)

    @needs(DeviceState.AWAKE)
    def teach(self, batch: list[MicroBatch]) -> None:
        """Keep the teacher's last hidden states of `batch`, and its head, for `forward_backward` on the same batch."""
        assert self.reference is not None, "no teacher was loaded"
        weight_VD, bias_V = self._teacher_head()
        with torch.no_grad():
            for row in batch:
                hidden_ND: Tensor = self._forward(self.reference, replace(row, experts_TLK=None), target_N=None)
                self._taught.append(TeacherTokens(hidden_ND.cpu(), weight_VD, bias_V))

    @needs(DeviceState.AWAKE)
    def forward_backward(self, batch: list[MicroBatch], denominator: float) -> BatchSums:
        """See TrainEngine; the loss reads what `teach` kept of the batch."""
        assert len(self._taught) in (0, len(batch)), "the teacher read another batch"
        return super().forward_backward(batch, denominator)

    def _forward(self, model: Callable[..., Any], row: MicroBatch, **options: Any) -> Any:
        if model is self.engine and self._taught:
            tokens = self._taught.popleft()
            options["teacher"] = tokens._replace(hidden_ND=tokens.hidden_ND.to(self.device))
        return super()._forward(model, row, **options)

    def _teacher_head(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of the teacher's head, whole on every rank."""
        model: Any = getattr(self.reference, "module", self.reference)  # under ZeRO-3 it is a DeepSpeed engine
        head = dict(model.causal_lm.get_output_embeddings().named_parameters())
        sharded = self.spec.trainer.zero_stage == 3
        with gathered(head, zero_stage=self.spec.trainer.zero_stage):
            tensors = {name: x.detach().clone() if sharded else x.detach() for name, x in head.items()}
        return tensors["weight"], tensors.get("bias")
