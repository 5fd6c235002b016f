"""The gates of a mixture of experts: which experts each token went to, and experts given instead of chosen.

`Routers` stands between the gates of a model and its experts. It counts where tokens go, lets a pass replay experts
that were chosen elsewhere (in rollout, or by the policy before its update) with weights from the gate's own scores, so
that the router still learns (routing replay: arXiv:2507.18071, arXiv:2510.11370), and attaches what balances the load.
Where nothing is replayed or balanced, what a gate answers is handed on untouched.

Legend: T tokens of the packed row, L gates (layers with a mixture, leading dense layers have none), E experts of a
layer, K experts a token is sent to, H model width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Gate:
    """One layer's gate and how its scores become weights.

    scores = sigmoid or softmax of the logits (DeepSeek-V3 eq. 15, DeepSeek-V2 eq. 22); a weight is the score of a
    chosen expert, divided by the sum over the chosen ones where `normalizes`, times `scale`. Experts lie in
    `num_groups` groups of neighbours, of which a token may reach `top_groups`.
    """

    name: str
    module: Any
    sigmoid: bool
    normalizes: bool
    scale: float
    num_groups: int
    top_groups: int

    @property
    def num_experts(self) -> int:
        """E."""
        return self.module.num_experts

    @property
    def top_k(self) -> int:
        """K."""
        return self.module.top_k

    @property
    def bias_E(self) -> Tensor | None:
        """What is added to the scores for the choice alone (V3's `noaux_tc`), or None."""
        return getattr(self.module, "e_score_correction_bias", None)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """float32 [T, E]: each token's affinity to each expert."""
        return logits_TE.float().sigmoid() if self.sigmoid else logits_TE.float().softmax(dim=-1)

    def weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """float32 [T, K]: what the answers of `experts_TK` are multiplied by."""
        weights_TK = self.scores(logits_TE).gather(1, experts_TK)
        if self.normalizes:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK * self.scale


class Balancing(Protocol):
    """What may change the weights of a training pass (pipeline.train.balancing)."""

    def __call__(self, layer: int, scores_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """The weights, [T, K], with what balances attached to them."""
        ...


class Routers:
    """The gates of `model` in the order of depth; empty for a dense model, and for gates of a kind not known here.

    A second instance on the same model disconnects the first.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [
            (name, module)
            for name, module in model.named_modules()
            if type(module).__name__.lower().endswith("topkrouter")
        ]
        found = [_gate(name, module) for name, module in modules]
        gates = [gate for gate in found if gate is not None]
        known = len(gates) == len(found) and len({(gate.num_experts, gate.top_k) for gate in gates}) == 1
        self.gates = gates if known else []
        self.balancing: Balancing | None = None
        for layer, gate in enumerate(self.gates):
            gate.module.forward = partial(self._forward, layer)
        self._given: list[Tensor] | None = None
        self._chosen: list[Tensor | None] = []
        self._counting = False
        self._load_LE: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The gates' module names, [L]."""
        return [gate.name for gate in self.gates]

    def __len__(self) -> int:
        return len(self.gates)

    def begin(self, experts_TLK: Tensor | None = None, *, counts: bool = False) -> None:
        """Everything from here to the next `begin` is one forward pass, and what backward computes of it again.

        experts_TLK: integers [T, L, K], the experts to send each token to instead of the gate's choice. A place where
        any of the K is NO_ROUTE is left to the gate. counts: whether its load is added up (see `take_load`). Raises
        ValueError for experts that this model does not have.
        """
        self._count()
        if experts_TLK is not None:
            gate = self.gates[0] if self.gates else None
            expected = (len(self), gate.top_k) if gate else None
            if gate is None or tuple(experts_TLK.shape[1:]) != expected or experts_TLK.max() >= gate.num_experts:
                raise ValueError(
                    f"experts of shape [T, L, K] = {list(experts_TLK.shape)}, the highest {experts_TLK.max()}, do not "
                    f"fit a model whose [L, K] is {list(expected or ())} with {gate.num_experts if gate else 0} "
                    "experts a layer: routes can be replayed only in the model that made them, and only by gates of a "
                    "known kind"
                )
            self._given = [experts_TK.long() for experts_TK in experts_TLK.unbind(1)]
        else:
            self._given = None
        self._chosen = [None] * len(self)
        self._counting = counts

    @property
    def chosen_TLK(self) -> Tensor:
        """int64 [T, L, K]: the experts of the last pass, given ones included."""
        return torch.stack([experts_TK for experts_TK in self._chosen if experts_TK is not None], dim=1)

    def take_load(self) -> Tensor | None:
        """int64 [L, E]: tokens sent to each expert in the counted passes since the last call; None where none were."""
        self._count()
        self._counting = False  # else the same pass would be counted by the next call
        load_LE, self._load_LE = self._load_LE, None
        return load_LE

    def _count(self) -> None:
        """Add the last pass to the load. Only now: a layer that backward computes again is then counted once."""
        if not self._counting:
            return
        num_experts = self.gates[0].num_experts if self.gates else 0
        places = [c.flatten() + layer * num_experts for layer, c in enumerate(self._chosen) if c is not None]
        if places:
            load = torch.bincount(torch.cat(places), minlength=len(self) * num_experts).view(len(self), num_experts)
            self._load_LE = load if self._load_LE is None else self._load_LE + load

    def _forward(self, layer: int, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In the place of a gate's own forward."""
        gate = self.gates[layer]
        logits_TE, weights_TK, experts_TK = type(gate.module).forward(gate.module, hidden_states)
        if self._given is not None:
            experts_TK, weights_TK = _replayed(gate, self._given[layer], logits_TE, weights_TK, experts_TK)
        if self._chosen:  # not before the first `begin`
            self._chosen[layer] = experts_TK
        if self.balancing is not None and self._counting:
            weights_TK = self.balancing(layer, gate.scores(logits_TE), weights_TK, experts_TK)
        return logits_TE, weights_TK, experts_TK


def _replayed(
    gate: Gate, given_TK: Tensor, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Experts and weights with the given experts where they are known."""
    known_T1 = (given_TK >= 0).all(dim=1, keepdim=True)
    experts_TK = torch.where(known_T1, given_TK, experts_TK)
    given_weights_TK = gate.weights(logits_TE, experts_TK).to(weights_TK.dtype)
    return experts_TK, torch.where(known_T1, given_weights_TK, weights_TK)


def _gate(name: str, module: Any) -> Gate | None:
    """The gate, if it is of a known kind: its answer to a few rows must be what `Gate` says it is."""
    if not all(hasattr(module, known) for known in ("weight", "num_experts", "top_k")):
        return None
    in_groups = getattr(module, "topk_method", "") != "greedy"
    groups = tuple((in_groups and getattr(module, key, None)) or 1 for key in ("num_group", "topk_group"))
    sigmoid, scale = hasattr(module, "e_score_correction_bias"), getattr(module, "routed_scaling_factor", 1.0)
    with torch.no_grad():
        rows_TH = module.weight[:4] * (3 / module.weight[:4].float().square().sum(dim=1, keepdim=True).clamp(min=1e-6))
        answer = type(module).forward(module, rows_TH.to(module.weight.dtype))
        if not isinstance(answer, tuple) or len(answer) != 3:
            return None
        logits_TE, weights_TK, experts_TK = answer
        if experts_TK.dtype != torch.int64:  # the same three in another order, or of another meaning
            return None
        for normalizes in (False, True):
            gate = Gate(name, module, sigmoid, normalizes, scale, *groups)
            if torch.allclose(gate.weights(logits_TE, experts_TK), weights_TK.float(), rtol=1e-2):
                return gate
    return None
