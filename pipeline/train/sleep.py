"""A rank's state on its way to the host's memory and back: optimizer, weights and gradients.

Without ZeRO DeepSpeed moves nothing, and offloaded weights leave nothing to move. Under ZeRO-3 it moves the state of
its own FusedAdam only: that of torch's AdamW is moved here.
"""

from typing import Any

import torch

from configs.train import TrainerConfig

NOT_THE_OPTIMIZER = ["lp_params", "lp_grads", "contiguous_grad_buffer"]
"""DeepSpeed's names of what ZeRO-3 moves whoever the optimizer is."""


def leave_device(engine: Any, trainer: TrainerConfig) -> None:
    """Everything of the DeepSpeed `engine` that can goes to the host's memory."""
    if _sleeps(trainer):
        engine.offload_states(include=NOT_THE_OPTIMIZER if _keeps_optimizer(trainer) else None)
        if _keeps_optimizer(trainer):
            _move_optimizer(engine, torch.device("cpu"))


def return_to(device: torch.device, engine: Any, trainer: TrainerConfig) -> None:
    """The reverse of `leave_device`."""
    if _sleeps(trainer):
        engine.reload_states()
        if _keeps_optimizer(trainer):
            _move_optimizer(engine, device)


def _sleeps(trainer: TrainerConfig) -> bool:
    return trainer.zero_stage > 0 and not (trainer.offload and trainer.offload.parameters)


def _keeps_optimizer(trainer: TrainerConfig) -> bool:
    return trainer.zero_stage == 3 and trainer.offload is None


def _move_optimizer(engine: Any, device: torch.device) -> None:
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        for tensor in (master, *engine.basic_optimizer.state[master].values()):
            tensor.data = tensor.data.to(device)
