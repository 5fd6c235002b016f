"""AdamW that keeps its moments in bfloat16, as DeepSeek-V3 was trained (arXiv:2412.19437, section 3.3.3).

torch's AdamW takes moments of the weights' dtype only, DeepSpeed's in bfloat16 want master weights in bfloat16 too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import AdamW, adamw

CHUNK = 2**24
"""Elements whose moments are in float32 at a time, while they are updated."""


class BF16MomentsAdamW(AdamW):
    """torch's AdamW on float32 weights, its two moments rounded to bfloat16 after each step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
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
        whole = (weight, grad, state["exp_avg"], state["exp_avg_sq"])
        for values, grads, mean, square in zip(*(each.view(-1).split(CHUNK) for each in whole), strict=True):
            means, squares, step = mean.float(), square.float(), state["step"].clone()
            adamw(
                [values], [grads], [means], [squares], [], [step],
                fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            mean.copy_(means)
            square.copy_(squares)
        state["step"] += 1
