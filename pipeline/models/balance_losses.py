"""Balance losses for the load of experts, token dropping, V3's bias, and figures of the load, as pure functions.

The losses are those of DeepSeek-V2 (arXiv:2405.04434 eq. 23-31) and V3 (arXiv:2412.19437 eq. 17-20) for one sequence,
without their factor alpha; each is 1 for an even load.

Legend: T tokens of the packed row, S sequences in it, L layers, E experts of a layer, K experts a token is sent to,
D groups of experts (devices of V2, nodes of V3), M groups that a token is sent to at most.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.models.attention import Layout


@dataclass(frozen=True)
class Sequences:
    """The sequences of a packed row: each segment without children, preceded by its parent's tokens."""

    layout: Layout
    device: torch.device

    @cached_property
    def segment_T(self) -> Tensor:
        """int64 [T]: the segment of each token."""
        lengths = torch.tensor(self.layout.lengths, device=self.device)
        return torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)

    @cached_property
    def own_S(self) -> Tensor:
        """int64 [S]: the last segment of each sequence."""
        parents = set(self.layout.parents)
        return torch.tensor([s for s in range(len(self.layout.lengths)) if s not in parents], device=self.device)

    @cached_property
    def parent_S(self) -> Tensor:
        """int64 [S]: the parent of that segment, or -1."""
        return torch.tensor(self.layout.parents, device=self.device)[self.own_S]

    @cached_property
    def tokens_S1(self) -> Tensor:
        """float32 [S, 1]: the number of tokens of each sequence."""
        return self.sums(torch.ones_like(self.segment_T, dtype=torch.float32).unsqueeze(1))

    def sums(self, values_TX: Tensor) -> Tensor:
        """Sum rows over each sequence, [S, X]; a shared prompt counts in all of its sequences."""
        # the extra row stays zero; parent -1 indexes it
        sums = values_TX.new_zeros(len(self.layout.lengths) + 1, values_TX.shape[1])
        sums = sums.index_add(0, self.segment_T, values_TX)
        return sums[self.own_S] + sums[self.parent_S]

    def means(self, values_TX: Tensor) -> Tensor:
        """Average rows over each sequence, [S, X]."""
        return self.sums(values_TX) / self.tokens_S1


def expert_mask(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return float32 [T, E]: 1 where the token is sent to the expert."""
    return torch.zeros(len(experts_TK), num_experts, device=experts_TK.device).scatter_(1, experts_TK, 1.0)


def load_fractions(experts_TK: Tensor, num_experts: int, sequences: Sequences) -> Tensor:
    """Compute f_i = E / (K T) x tokens of expert i, float32 [S, E]; 1 for an even load (V2 eq. 24, V3 eq. 18)."""
    return sequences.means(expert_mask(experts_TK, num_experts)) * (num_experts / experts_TK.shape[1])


def expert_balance(fractions_SE: Tensor, scores_SE: Tensor) -> Tensor:
    """Compute sum_i f_i P_i, [S], with scores_SE = P_i, the mean affinity to each expert (V2 eq. 23; V3 eq. 17)."""
    return (fractions_SE * scores_SE).sum(dim=1)


def device_balance(fractions_SE: Tensor, scores_SE: Tensor, num_groups: int) -> Tensor:
    """Compute the same sum over groups, [S], with f the mean and P the sum of a group (V2 eq. 26-28)."""
    fractions_SD = fractions_SE.unflatten(1, (num_groups, -1)).mean(dim=2)
    return (fractions_SD * scores_SE.unflatten(1, (num_groups, -1)).sum(dim=2)).sum(dim=1)


def communication_balance(
    experts_TK: Tensor, scores_SE: Tensor, sequences: Sequences, *, num_groups: int, top_groups: int
) -> Tensor:
    """Compute the sum over groups of f'' P'', [S], f'' = D / (M T) x tokens sent to the group (V2 eq. 29-31)."""
    groups_TK = experts_TK // (scores_SE.shape[1] // num_groups)
    fractions_SD = sequences.means(expert_mask(groups_TK, num_groups)) * (num_groups / top_groups)
    return (fractions_SD * scores_SE.unflatten(1, (num_groups, -1)).sum(dim=2)).sum(dim=1)


def sequence_balance(scores_TE: Tensor, top_k: int, sequences: Sequences) -> Tensor:
    """Compute V3's complementary loss, [S] (eq. 17-20).

    It counts the K highest affinities, without bias or group limit. Affinities are divided by their sum over experts.
    """
    fractions_SE = load_fractions(scores_TE.topk(top_k, dim=1).indices, scores_TE.shape[1], sequences)
    return expert_balance(fractions_SE, sequences.means(scores_TE / scores_TE.sum(dim=1, keepdim=True)))


def kept_tokens(
    scores_TK: Tensor, experts_TK: Tensor, protected_T: Tensor, *, num_experts: int, num_groups: int, capacity: float
) -> Tensor:
    """Return bool [T, K]: the pairs of token and expert that device-level token dropping keeps (DeepSeek-V2 2.2.4).

    The budget of a group is `capacity` times its even share of the row's pairs. Beyond it, the pairs of lowest affinity
    `scores_TK` are dropped. Tokens in `protected_T` are never dropped and fill the budget first.
    """
    groups_P = (experts_TK // (num_experts // num_groups)).flatten()
    budget = math.floor(capacity * len(groups_P) / num_groups)
    protected_P = protected_T.unsqueeze(1).expand_as(experts_TK).flatten()
    affinity_P = scores_TK.flatten().masked_fill(protected_P, math.inf)
    order_P = affinity_P.argsort(descending=True, stable=True)
    order_P = order_P[groups_P[order_P].argsort(stable=True)]  # by group, and from high to low within a group
    sizes_D = torch.bincount(groups_P, minlength=num_groups)
    firsts_P = (sizes_D.cumsum(0) - sizes_D)[groups_P[order_P]]
    rank_P = torch.empty_like(order_P)
    rank_P[order_P] = torch.arange(len(order_P), device=order_P.device) - firsts_P
    return ((rank_P < budget) | protected_P).view_as(experts_TK)


def bias_steps(load_LE: Tensor, rate: float) -> Tensor:
    """Compute the step of each gate's bias, float32 [L, E] (V3 section 2.1.2; arXiv:2408.15664 algorithm 1).

    It is +rate for an expert with less than its layer's mean load, -rate for one with more.
    """
    load_LE = load_LE.double()
    return rate * (load_LE.mean(dim=1, keepdim=True) - load_LE).sign().float()


def max_violation(load_LE: Tensor) -> Tensor:
    """Compute MaxVio = max load / mean load - 1, float64 [L] (arXiv:2408.15664 eq. 4); 0 is even."""
    load_LE = load_LE.double()
    return load_LE.amax(dim=1) / load_LE.mean(dim=1) - 1


def load_entropy(load_LE: Tensor) -> Tensor:
    """Compute the entropy of the load as a share of its maximum, float64 [L]: 1 is even, 0 is a single expert."""
    shares_LE = load_LE.double() / load_LE.sum(dim=1, keepdim=True)
    return torch.special.entr(shares_LE).sum(dim=1) / math.log(load_LE.shape[1])
