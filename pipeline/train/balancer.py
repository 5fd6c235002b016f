"""Balance the load of experts in training: losses at the gates, the bias step, and the figures of every step.

A balance loss is attached to the weights that leave a gate: the weights pass unchanged, and the backward pass adds the
gradient of the loss. So no loss has to be returned through the model, and activation checkpointing recomputes it with
its layer. Losses are means over the sequences of the whole batch, for every split of it.

Legend: see pipeline.models.balance_losses; R root segments.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from configs.balance import V2Balance, V3Balance
from pipeline.data.trees import MicroBatch
from pipeline.models.attention import Layout
from pipeline.models.balance_losses import (
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

_LOSSES = ("expert", "device", "communication", "sequence")
"""Names of the losses, which are the settings of their factors."""
_DROPPED = "experts/dropped_rate"


class Balancer:
    """Balance the load of `routers` over all ranks by `config`; with None the load is only measured.

    group: the ranks that share this rank's experts; None where it holds all of them. Raises ValueError for a balance
    that the model's gates or the group don't support.
    """

    def __init__(
        self, routers: Routers, config: V2Balance | V3Balance | None, device: torch.device, group: Any | None = None
    ) -> None:
        self._routers, self._config, self._device, self._group = routers, config, device, group
        self._names: list[str] = []
        if config is not None:
            _refuse_unsupported(routers, config)
            _refuse_other_groups(routers, config, group)
            self._names = [f"loss/{name}_balance_mean" for name in _LOSSES if getattr(config, name, 0)]
            self._names += [_DROPPED] if _capacity(config) else []
        if self._names:
            routers.balance = self
        self._sums_X = torch.zeros(len(self._names), dtype=torch.double, device=device)
        self.load: dict[str, list[int]] = {}
        """Tokens of each expert in the last step, by the name of the gate."""

    def begin_batch(self, batch: Sequence[MicroBatch]) -> None:
        """Begin a batch, of which this rank computes the rows `batch`."""
        if self._names:
            num_sequences = sum(len(row.lengths) - len(set(row.parents) - {-1}) for row in batch if len(row.target_N))
            count = torch.tensor(num_sequences, device=self._device)
            torch.distributed.all_reduce(count)
            self._share = 1 / max(int(count), 1)

    def begin_row(self, row: MicroBatch) -> None:
        """Begin the forward pass of a micro-batch."""
        if self._names:
            layout = Layout(row.lengths, row.parents, row.repeated)
            self._sequences = Sequences(layout, self._device)
            self._counted_T = layout.counted_T.to(self._device)
            # A row without targets only fills up the rows of a rank, but its tokens reach the experts too.
            self._counted: set[int] = set() if len(row.target_N) else {*range(len(self._routers))}
            self._has_losses = len(row.target_N) > 0
            if isinstance(self._config, V2Balance) and self._config.capacity:
                self._protected_T = torch.from_numpy(protected_tokens(row, self._config.never_dropped)).to(self._device)

    def __call__(self, layer: int, scores_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of a gate with the losses attached, 0 for dropped pairs, and the experts, E for those."""
        gate, config = self._routers.gates[layer], self._config
        assert config is not None
        losses = self._losses(gate, config, scores_TE, experts_TK) if self._has_losses else []
        figures = [loss.detach().double() * self._share for loss in losses]
        if losses:
            # undo DeepSpeed's mean over ranks, as for the loss of the batch
            scale = self._share * torch.distributed.get_world_size()
            weights_TK = attach_loss(weights_TK, torch.stack(losses).sum(), scale)
        if capacity := _capacity(config):
            keep_TK = self._kept(gate, capacity, scores_TE.detach().gather(1, experts_TK), experts_TK)
            weights_TK = weights_TK * keep_TK
            experts_TK = experts_TK.masked_fill(~keep_TK, gate.num_experts)
            figures.append((~keep_TK[self._counted_T]).sum().double())
        if layer not in self._counted:  # otherwise the backward pass recomputes the layer
            self._counted.add(layer)
            self._sums_X += torch.stack(figures)
        return weights_TK, experts_TK

    def step(self) -> dict[str, float]:
        """Move the bias after the update of a step, and return the step's figures; none for a dense model."""
        if not self._routers:
            return {}
        shape = len(self._routers), self._routers.gates[0].num_experts
        load_LE = self._routers.take_load()
        if load_LE is None:  # this rank had no work
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
        if _DROPPED in figures:
            figures[_DROPPED] /= load_LE.sum().item()
        violation_L = max_violation(load_LE)
        return figures | {
            "experts/max_vio_mean": violation_L.mean().item(),
            "experts/max_vio_max": violation_L.max().item(),
            "experts/entropy_mean": load_entropy(load_LE).mean().item(),
            "experts/dead_count": float((load_LE == 0).sum()),
        }

    def _kept(self, gate: Gate, capacity: float, affinity_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """Return bool [T, K]: the pairs that are kept. A device's budget is for what all ranks of the group send it, so
        every rank ranks the pairs of all."""
        protected_T1 = self._protected_T.unsqueeze(1)
        columns = affinity_TK, experts_TK.float(), protected_T1.float()  # numbers of experts are exact in float32
        rows, own = _rows_of_group(torch.cat(columns, dim=1), self._group)
        affinity, experts, protected = rows.split([gate.top_k, gate.top_k, 1], dim=1)
        sizes = {"num_experts": gate.num_experts, "num_groups": gate.num_groups}
        return kept_tokens(affinity, experts.long(), protected[:, 0] > 0, **sizes, capacity=capacity)[own]

    def _losses(self, gate: Gate, config: V2Balance | V3Balance, scores_TE: Tensor, experts_TK: Tensor) -> list[Tensor]:
        """Compute the losses with their factors, summed over the row's sequences, in the order of _LOSSES."""
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
            losses_S = communication_balance(experts_TK, scores_SE, sequences, **groups)
            losses.append(config.communication * losses_S.sum())
        return losses


def _rows_of_group(rows_TX: Tensor, group: Any | None) -> tuple[Tensor, slice]:
    """Gather the rows of all ranks of `group`, of any number each, in their order; return them and the place of this
    rank's own."""
    if group is None:
        return rows_TX, slice(None)
    number = torch.distributed.get_rank(group)
    counts = rows_TX.new_zeros(torch.distributed.get_world_size(group), dtype=torch.long)
    torch.distributed.all_gather_into_tensor(counts, counts.new_full((1,), len(rows_TX)), group=group)
    longest, first = int(counts.max()), int(counts[:number].sum())
    padded = pad(rows_TX, (0, 0, 0, longest - len(rows_TX)))
    gathered = padded.new_empty(len(counts) * longest, rows_TX.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, padded.contiguous(), group=group)
    parts = zip(gathered.split(longest), counts.tolist(), strict=True)
    return torch.cat([part[:count] for part, count in parts]), slice(first, first + len(rows_TX))


def protected_tokens(row: MicroBatch, share: float) -> NDArray[np.bool_]:
    """Return bool [T]: True for the tokens of about `share` of the sequences, selected by the checksum of their root.

    The selection doesn't depend on the packing, and a resumed run makes the same.
    """
    ends = np.cumsum(row.lengths)
    low_R = [
        zlib.crc32(row.token_ids_T[end - length : end].tobytes()) < share * 2**32
        for length, end in zip(row.lengths, ends, strict=True)
    ]
    roots = [segment if parent == -1 else parent for segment, parent in enumerate(row.parents)]
    return np.repeat(np.asarray(low_R)[roots], row.lengths)


def attach_loss(weights_TK: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `weights_TK` unchanged; their backward pass adds the gradient of scale x loss."""
    return _AttachLoss.apply(weights_TK, loss, scale)  # pyright: ignore[reportReturnType]


class _AttachLoss(torch.autograd.Function):
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


def _refuse_other_groups(routers: Routers, config: V2Balance | V3Balance, group: Any | None) -> None:
    """Raise ValueError if ranks don't hold one group of experts each, and a group has a budget."""
    capacity, num_groups = _capacity(config), routers.gates[0].num_groups
    if group is not None and capacity and torch.distributed.get_world_size(group) != num_groups:
        raise ValueError(
            f"balance.capacity={capacity} is the budget of a device, which holds one group of experts: set "
            f"trainer.expert_parallel_size to the model's {num_groups} groups or to 1, or capacity to null"
        )


def _refuse_unsupported(routers: Routers, config: V2Balance | V3Balance) -> None:
    """Raise ValueError if the gates don't support the balance."""
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
