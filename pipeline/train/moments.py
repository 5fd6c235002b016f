"""AdamW with moments in bfloat16, as in DeepSeek-V3's training (arXiv:2412.19437, section 3.3.3).

torch's AdamW has moments in the weights' dtype only; DeepSpeed's bfloat16 moments require bfloat16 master weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import AdamW, adamw

_CHUNK_ELEMENTS = 2**24
"""Elements whose moments are in float32 at a time during the update."""


class BF16MomentsAdamW(AdamW):
    """torch's AdamW on float32 weights, its two moments rounded to bfloat16 after each step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(weight, dtype=torch.bfloat16)
        tensors = (weight, grad, state["exp_avg"], state["exp_avg_sq"])
        for values, grads, mean, square in zip(*(x.view(-1).split(_CHUNK_ELEMENTS) for x in tensors), strict=True):
            means, squares, step = mean.float(), square.float(), state["step"].clone()
            adamw(
                [values], [grads], [means], [squares], [], [step],
                fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            mean.copy_(means)
            square.copy_(squares)
        state["step"] += 1
