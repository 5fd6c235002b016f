"""Record, replay and balance the routing of a mixture of experts.

`Routers` wraps the gates of a model. It counts the tokens of each expert, and applies a balance to the weights. It also
replays experts that were chosen elsewhere: in rollout, or by the policy before its update. The weights of replayed
experts come from the gate's own scores, so the router still learns (routing replay: arXiv:2507.18071,
arXiv:2510.11370). Without replay and balance, the outputs of a gate are unchanged.

Legend: T tokens of the packed row, L gates (leading dense layers have none), E experts of a
layer, K experts a token is sent to, H model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.attention import Layout
from pipeline.models.cut_down import stand_in


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate of one layer, and the way its scores become weights.

    scores = sigmoid or softmax of the logits (DeepSeek-V3 eq. 15, DeepSeek-V2 eq. 22). The weight of a chosen expert is
    its score times `scale`, with `normalizes` divided by the sum over the chosen experts. Neighbouring experts form
    `num_groups` groups; a token is sent to at most `top_groups` of them.
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
        return self.module.num_experts

    @property
    def top_k(self) -> int:
        return self.module.top_k

    @property
    def bias_E(self) -> Tensor | None:
        """The bias that is added to the scores for choosing experts only (V3's `noaux_tc`), or None."""
        return getattr(self.module, "e_score_correction_bias", None)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Compute float32 [T, E]: the affinity of each token to each expert."""
        return logits_TE.float().sigmoid() if self.sigmoid else logits_TE.float().softmax(dim=-1)

    def weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Compute float32 [T, K]: the weights of the outputs of `experts_TK`."""
        weights_TK = self.scores(logits_TE).gather(1, experts_TK)
        if self.normalizes:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK * self.scale


BalanceHook = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps layer, scores_TE, weights_TK and experts_TK of a training pass to weights [T, K], 0 for a dropped pair, and
experts [T, K], E for a dropped pair (pipeline.train.balancer)."""


class Routers:
    """The gates of `model` in order of depth; empty for a dense model and for an unknown kind of gate.

    A second instance on the same model disconnects the first.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [
            (name, module)
            for name, module in model.named_modules()
            if type(module).__name__.lower().endswith("topkrouter")
        ]
        gates = [gate for name, module in modules if (gate := _gate(name, module)) is not None]
        known = len(gates) == len(modules) and len({(gate.num_experts, gate.top_k) for gate in gates}) == 1
        self.gates = gates if known else []
        self.balance: BalanceHook | None = None
        for layer, gate in enumerate(self.gates):
            gate.module.forward = partial(self._forward, layer)
        self._replayed: list[Tensor] | None = None
        self._chosen: list[Tensor | None] = []
        self._counted_T: Tensor | None = None
        self._load_LE: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The gates' module names, [L]."""
        return [gate.name for gate in self.gates]

    def __len__(self) -> int:
        return len(self.gates)

    def begin(self, experts_TLK: Tensor | None = None, *, counted_T: Tensor | None = None) -> None:
        """Begin a forward pass, which includes its recomputation in the backward pass.

        experts_TLK: integers [T, L, K], the experts to replay. If any of a token's K experts is NO_ROUTE, the
        gate chooses. counted_T: bool [T], the tokens that count in `take_load`; None for a pass that does not train.
        Raises ValueError for experts that this model does not have.
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
        self._replayed = None if experts_TLK is None else [experts_TK.long() for experts_TK in experts_TLK.unbind(1)]
        self._chosen = [None] * len(self)
        self._counted_T = counted_T

    @property
    def chosen_TLK(self) -> Tensor:
        """int64 [T, L, K]: the experts of the last pass, replayed ones included."""
        return torch.stack([experts_TK for experts_TK in self._chosen if experts_TK is not None], dim=1)

    def take_load(self) -> Tensor | None:
        """Return int64 [L, E]: tokens of each expert in the passes counted since the last call, or None without any."""
        self._count()
        self._counted_T = None  # otherwise the next call would count this pass again
        load_LE, self._load_LE = self._load_LE, None
        return load_LE

    def _count(self) -> None:
        """Add the last pass to the load. Counting after the pass counts layers that backward recomputes only once."""
        if self._counted_T is None:
            return
        num_experts = self.gates[0].num_experts if self.gates else 0
        experts = [
            experts_TK[self._counted_T].flatten() + layer * num_experts
            for layer, experts_TK in enumerate(self._chosen)
            if experts_TK is not None
        ]
        if experts:
            load = torch.bincount(torch.cat(experts), minlength=len(self) * num_experts).view(len(self), num_experts)
            self._load_LE = load if self._load_LE is None else self._load_LE + load

    def _forward(self, layer: int, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace the gate's own forward pass."""
        gate = self.gates[layer]
        logits_TE, weights_TK, experts_TK = type(gate.module).forward(gate.module, hidden_states)
        if self._replayed is not None:
            experts_TK, weights_TK = _replay(gate, self._replayed[layer], logits_TE, weights_TK, experts_TK)
        if self._chosen:  # empty before the first `begin`
            self._chosen[layer] = experts_TK
        if self.balance is not None and self._counted_T is not None:
            weights_TK, experts_TK = self.balance(layer, gate.scores(logits_TE), weights_TK, experts_TK)
        return logits_TE, weights_TK, experts_TK


def counted_tokens(layout: Layout, num_targets: int, device: torch.device) -> Tensor | None:
    """Return bool [T], the tokens that count towards the load of experts; None for a pass without gradients. A row
    without targets, which fills up a rank's rows, has none."""
    return (layout.counted_T & (num_targets > 0)).to(device) if torch.is_grad_enabled() else None


def _replay(
    gate: Gate, replayed_TK: Tensor, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return experts and weights, with the replayed experts where they are known."""
    known_T1 = (replayed_TK >= 0).all(dim=1, keepdim=True)
    experts_TK = torch.where(known_T1, replayed_TK, experts_TK)
    replayed_weights_TK = gate.weights(logits_TE, experts_TK).to(weights_TK.dtype)
    return experts_TK, torch.where(known_T1, replayed_weights_TK, weights_TK)


def _gate(name: str, module: Any) -> Gate | None:
    """Return the gate if it is of a known kind: on a few rows it must return the weights that `Gate` computes."""
    if not all(hasattr(module, name) for name in ("weight", "num_experts", "top_k")):
        return None
    uses_groups = getattr(module, "topk_method", "") != "greedy"
    groups = tuple((uses_groups and getattr(module, key, None)) or 1 for key in ("num_group", "topk_group"))
    sigmoid, scale = hasattr(module, "e_score_correction_bias"), getattr(module, "routed_scaling_factor", 1.0)
    probe = stand_in(module)
    with torch.no_grad():
        rows_TH = probe.weight[:4] * (3 / probe.weight[:4].float().square().sum(dim=1, keepdim=True))
        outputs = probe.forward(rows_TH.to(probe.weight.dtype))
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            return None
        logits_TE, weights_TK, experts_TK = outputs
        if experts_TK.dtype != torch.int64:  # three outputs in another order or of another meaning
            return None
        for normalizes in (False, True):
            gate = Gate(name, module, sigmoid, normalizes, scale, *groups)
            if torch.allclose(gate.weights(logits_TE, experts_TK), weights_TK.float(), rtol=1e-2):
                return gate
    return None
