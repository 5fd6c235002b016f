"""Move a rank's optimizer, weights and gradients to the host's memory and back.

DeepSpeed can't move them without ZeRO, and offloaded weights are on the host already. Under ZeRO-3 it moves only the
state of its own FusedAdam, so the state of torch's AdamW is moved here.
"""

from typing import Any

import torch

from configs.train import TrainerConfig

_WEIGHTS_AND_GRADIENTS = ["lp_params", "lp_grads", "contiguous_grad_buffer"]
"""DeepSpeed's names of the states that ZeRO-3 moves with any optimizer."""


def move_to_host(engine: Any, trainer: TrainerConfig) -> None:
    """Move the state of the DeepSpeed `engine` to the host's memory."""
    if _can_move(trainer):
        engine.offload_states(include=_WEIGHTS_AND_GRADIENTS if _needs_optimizer_moved(trainer) else None)
        if _needs_optimizer_moved(trainer):
            _move_optimizer(engine, torch.device("cpu"))


def move_to_device(device: torch.device, engine: Any, trainer: TrainerConfig) -> None:
    """Move the state of the DeepSpeed `engine` back to `device`."""
    if _can_move(trainer):
        engine.reload_states()
        if _needs_optimizer_moved(trainer):
            _move_optimizer(engine, device)


def _can_move(trainer: TrainerConfig) -> bool:
    return trainer.zero_stage > 0 and not (trainer.offload and trainer.offload.parameters)


def _needs_optimizer_moved(trainer: TrainerConfig) -> bool:
    return trainer.zero_stage == 3 and trainer.offload is None


def _move_optimizer(engine: Any, device: torch.device) -> None:
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        for tensor in (master, *engine.basic_optimizer.state[master].values()):
            tensor.data = tensor.data.to(device)
