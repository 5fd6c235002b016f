"""The balance of the experts' load while a model trains: what is attached to a training pass, what follows it once a
step, and the figures of every step.

A loss enters where a gate's weights leave it: they are handed on as they are, and on the way back the gate gets the
loss's gradient besides its own. So no loss has to be returned through the model, and activation checkpointing
recomputes it with its layer. Losses are means over the sequences of the whole batch, whatever its split.

Legend: see pipeline.models.balance; R root segments.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from configs.balance import V2Balance, V3Balance
from pipeline.data.trees import MicroBatch
from pipeline.models.attention import Layout
from pipeline.models.balance import (
    Sequences,
    bias_steps,
    communication_balance,
    device_balance,
    expert_balance,
    kept_tokens,
    load_entropy,
    load_fractions,
    max_violation,
    sequence_balance,
)
from pipeline.models.routing import Gate, Routers

LOSSES = ("expert", "device", "communication", "sequence")
"""The losses by the names of their factors in the settings."""
DROPPED = "experts/dropped_rate"


class Balancer:
    """Balances what `routers` route by the rules of `config`, over all ranks. Without it the load is only measured.

    Raises ValueError for a balance that the model's gates can't have.
    """

    def __init__(self, routers: Routers, config: V2Balance | V3Balance | None, device: torch.device) -> None:
        self._routers, self._config, self._device = routers, config, device
        self._names: list[str] = []
        if config is not None:
            _check(routers, config)
            self._names = [f"loss/{name}_balance_mean" for name in LOSSES if getattr(config, name, 0)]
            self._names += [DROPPED] if _capacity(config) else []
        if self._names:
            routers.balancing = self
        self._sums_X = torch.zeros(len(self._names), dtype=torch.double, device=device)
        self.load: dict[str, list[int]] = {}
        """Tokens sent to each expert in the last step, by the name of the gate."""

    def begin_batch(self, batch: Sequence[MicroBatch]) -> None:
        """Before the passes of a batch, of which this rank's part is `batch`."""
        if self._names:
            num_sequences = sum(len(row.lengths) - len(set(row.parents) - {-1}) for row in batch if len(row.target_N))
            count = torch.tensor(num_sequences, device=self._device)
            torch.distributed.all_reduce(count)
            self._share = 1 / max(int(count), 1)

    def begin_row(self, row: MicroBatch) -> None:
        """Before the forward pass of a micro-batch."""
        if self._names:
            self._sequences = Sequences(Layout(row.lengths, row.parents), self._device)
            self._seen: set[int] = set()
            if isinstance(self._config, V2Balance) and self._config.capacity:
                self._protected_T = torch.from_numpy(protected_tokens(row, self._config.never_dropped)).to(self._device)

    def __call__(self, layer: int, scores_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weights of a gate's answer: losses are attached to them, and those of dropped pairs are zero."""
        gate, config = self._routers.gates[layer], self._config
        assert config is not None
        losses = self._losses(gate, config, scores_TE, experts_TK)
        figures = [loss.detach().double() * self._share for loss in losses]
        if losses:
            # DeepSpeed's mean over ranks is undone here as it is for the loss of the batch
            scale = self._share * torch.distributed.get_world_size()
            weights_TK = attached(weights_TK, torch.stack(losses).sum(), scale)
        if capacity := _capacity(config):
            keep_TK = kept_tokens(
                scores_TE.detach().gather(1, experts_TK),
                experts_TK,
                self._protected_T,
                num_experts=gate.num_experts,
                num_groups=gate.num_groups,
                capacity=capacity,
            )
            weights_TK = weights_TK * keep_TK
            figures.append((~keep_TK).sum().double())
        if layer not in self._seen:  # else it is backward that computes it again
            self._seen.add(layer)
            self._sums_X += torch.stack(figures)
        return weights_TK

    def step(self) -> dict[str, float]:
        """Once a step, after the update: move the bias. Returns the step's figures; of a dense model there are none."""
        if not self._routers:
            return {}
        shape = len(self._routers), self._routers.gates[0].num_experts
        load_LE = self._routers.take_load()
        if load_LE is None:  # this rank had no work; others may have had some
            load_LE = torch.zeros(shape, dtype=torch.long)
        totals = torch.cat([load_LE.to(self._device).double().flatten(), self._sums_X])  # exact up to 2^53
        torch.distributed.all_reduce(totals)
        load_LE = totals[: load_LE.numel()].view(shape)
        self._sums_X.zero_()
        self.load = dict(zip(self._routers.names, load_LE.long().tolist(), strict=True))
        if isinstance(self._config, V3Balance) and self._config.bias_rate:
            for gate, steps_E in zip(self._routers.gates, bias_steps(load_LE, self._config.bias_rate), strict=True):
                assert gate.bias_E is not None
                gate.bias_E.add_(steps_E)
        figures = dict(zip(self._names, totals[load_LE.numel() :].tolist(), strict=True))
        if DROPPED in figures:
            figures[DROPPED] /= load_LE.sum().item()
        violation_L = max_violation(load_LE)
        return figures | {
            "experts/max_vio_mean": violation_L.mean().item(),
            "experts/max_vio_max": violation_L.max().item(),
            "experts/entropy_mean": load_entropy(load_LE).mean().item(),
            "experts/dead_count": float((load_LE == 0).sum()),
        }

    def _losses(self, gate: Gate, config: V2Balance | V3Balance, scores_TE: Tensor, experts_TK: Tensor) -> list[Tensor]:
        """The losses with their factors, summed over the row's sequences, in the order of LOSSES."""
        sequences = self._sequences
        if isinstance(config, V3Balance):
            return [config.sequence * sequence_balance(scores_TE, gate.top_k, sequences).sum()]
        fractions_SE, scores_SE = load_fractions(experts_TK, gate.num_experts, sequences), sequences.means(scores_TE)
        losses: list[Tensor] = []
        if config.expert:
            losses.append(config.expert * expert_balance(fractions_SE, scores_SE).sum())
        if config.device:
            losses.append(config.device * device_balance(fractions_SE, scores_SE, gate.num_groups).sum())
        if config.communication:
            groups = {"num_groups": gate.num_groups, "top_groups": gate.top_groups}
            each_S = communication_balance(experts_TK, scores_SE, sequences, **groups)
            losses.append(config.communication * each_S.sum())
        return losses


def protected_tokens(row: MicroBatch, share: float) -> NDArray[np.bool_]:
    """bool [T]: the tokens of about `share` of the sequences, those whose first segment has a low checksum. So it is
    the same ones every time, however they are packed, and a resumed run drops what the first one dropped."""
    ends = np.cumsum(row.lengths)
    low_R = [
        zlib.crc32(row.token_ids_T[end - length : end].tobytes()) < share * 2**32
        for length, end in zip(row.lengths, ends, strict=True)
    ]
    roots = [segment if parent == -1 else parent for segment, parent in enumerate(row.parents)]
    return np.repeat(np.asarray(low_R)[roots], row.lengths)


def attached(weights_TK: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`weights_TK` as they are; whoever computes their gradient adds that of scale x loss to the graph's leaves."""
    return _Attached.apply(weights_TK, loss, scale)  # pyright: ignore[reportReturnType]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss = scale, (loss.dtype, loss.device)
        return weights_TK.view_as(weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, device = ctx.loss
        return grad_TK, torch.tensor(ctx.scale, dtype=dtype, device=device), None


def _capacity(config: V2Balance | V3Balance) -> float | None:
    return config.capacity if isinstance(config, V2Balance) else None


def _check(routers: Routers, config: V2Balance | V3Balance) -> None:
    """Raise ValueError where the gates lack what the balance needs."""
    if not routers:
        raise ValueError("balance is set, and the model has no gates of a known kind (a dense model?); remove balance")
    gate = routers.gates[0]
    if isinstance(config, V3Balance) and gate.bias_E is None:
        raise ValueError(
            "balance.type='v3' needs gates with a bias (e_score_correction_bias), which this model's don't have; "
            "take type 'v2'"
        )
    if isinstance(config, V2Balance) and gate.sigmoid:
        raise ValueError("balance.type='v2' is for softmax scores, and this model's gates use sigmoid; take type 'v3'")
    if isinstance(config, V2Balance) and gate.num_groups == 1 and (config.device or config.communication):
        raise ValueError(
            f"balance.device={config.device} and balance.communication={config.communication} have no effect: the "
            "model's experts are one group; set both to 0 (and capacity to null, unless it is below 1)"
        )
