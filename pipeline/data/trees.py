"""What is trained on: trees of tokens, packed into micro-batches.

A tree is a prompt and the branches that continue it: a GRPO group has G branches, a comparison one for each answer, a
conversation is a root alone. The root is computed once for all branches. Everything is flat numpy, so a micro-batch
crosses to a rank without a copy.

Legend: T tokens of a packed row, N trained tokens or scored answers, S trained sequences or comparisons, L mixture
layers, K experts a token is sent to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.packing import pack, split_by_tokens
from rollout.types import Routes

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that continue a root, all trained, with per-token columns (`advantages`, `weights`, ...); of a scored tree
    only the last is read, and a column has one value. `experts` are the routes to replay, if any."""

    token_ids: list[int]
    columns: dict[str, Sequence[float]] = field(default_factory=dict)
    experts: Routes | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """A root and its branches. `root_mask[t]` is 1 where the root's own token t is trained (never at t = 0). Of a
    `scored` tree the last token of each branch is read, and all branches are one sequence: a comparison. The root has
    routes to replay if its branches have."""

    root_ids: list[int]
    branches: list[Branch] = field(default_factory=list)
    root_mask: list[int] | None = None
    scored: bool = False
    root_experts: Routes | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens computed for this tree."""
        return len(self.root_ids) + sum(len(branch.token_ids) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row of a forward pass.

    token_ids_T: the row. lengths, parents: its layout (pipeline.models.attention.Layout).
    source_N, target_N: trained token i has id target_N[i] and is predicted by the hidden state of row source_N[i]; a
    scored answer's last token has id target_N[i] and is row source_N[i] itself.
    sequence_N: which of the num_sequences trained sequences token i, or comparisons answer i, belongs to.
    columns: float32 [N] by name.
    experts_TLK: the experts to send tokens to instead of the gates' choice, if any (see rollout.types.Routes).
    """

    token_ids_T: Ints
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    source_N: Ints
    target_N: Ints
    sequence_N: Ints
    num_sequences: int
    columns: dict[str, Floats]
    experts_TLK: Routes | None = None

    def with_column(self, name: str, values_N: Floats) -> "MicroBatch":
        """The same micro-batch with one more column."""
        assert values_N.shape == self.target_N.shape
        return replace(self, columns=self.columns | {name: values_N})


def micro_batch(trees: Sequence[Tree]) -> MicroBatch:
    """Lay trees out as one row."""
    row, lengths, parents = [], [], []
    source, target, sequence, columns = [], [], [], []
    routes: list[Routes | None] = []
    start = num_sequences = 0
    for tree in trees:
        root = len(lengths)
        row.append(tree.root_ids)
        routes.append(tree.root_experts)
        lengths.append(len(tree.root_ids))
        parents.append(-1)
        if tree.root_mask is not None:
            trained = np.flatnonzero(tree.root_mask)
            source.append(start + trained - 1)
            target.append(np.asarray(tree.root_ids, np.int64)[trained])
            sequence.append(np.full(len(trained), num_sequences))
            num_sequences += 1
        last_of_root = start + len(tree.root_ids) - 1
        start += len(tree.root_ids)
        for branch in tree.branches:
            length = len(branch.token_ids)
            row.append(branch.token_ids)
            routes.append(branch.experts)
            lengths.append(length)
            parents.append(root)
            rows = np.concatenate([[last_of_root], np.arange(start, start + length - 1)])
            read = np.array([start + length - 1]) if tree.scored else rows
            source.append(read)
            target.append(np.asarray(branch.token_ids, np.int64)[-len(read) :])
            sequence.append(np.full(len(read), num_sequences))
            columns.append(branch.columns)
            num_sequences += not tree.scored
            start += length
        num_sequences += tree.scored
    experts = [experts_TLK for experts_TLK in routes if experts_TLK is not None]
    assert not experts or len(experts) == len(routes), "routes of some tokens only: -1 says where none is known"
    return MicroBatch(
        token_ids_T=np.concatenate([np.asarray(ids, np.int64) for ids in row]),
        lengths=tuple(lengths),
        parents=tuple(parents),
        source_N=np.concatenate(source).astype(np.int64),
        target_N=np.concatenate(target),
        sequence_N=np.concatenate(sequence).astype(np.int64),
        num_sequences=num_sequences,
        columns={
            name: np.concatenate([np.asarray(of[name], np.float32) for of in columns])
            for name in (columns[0] if columns else {})
        },
        experts_TLK=np.concatenate(experts) if experts else None,
    )


def scored_tree(prompt_ids: list[int], answers: Sequence[list[int]], targets: Sequence[float] | None = None) -> Tree:
    """A prompt and its answers, each scored at its last token; `targets` are the scores that are learned."""
    columns: list[dict[str, Sequence[float]]] = [{"targets": [x]} for x in targets] if targets else [{}] * len(answers)
    return Tree(prompt_ids, [Branch(ids, of) for ids, of in zip(answers, columns, strict=True)], scored=True)


def deal(trees: Sequence[Tree], *, num_ranks: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """The places of trees in the micro-batches of each rank, [num_ranks][m]: dealt to ranks by their tokens, then
    packed into rows of at most micro_batch_tokens."""
    sizes = [tree.num_tokens for tree in trees]
    return [
        [[members[i] for i in row] for row in pack([sizes[i] for i in members], micro_batch_tokens)]
        for members in split_by_tokens(sizes, num_ranks)
    ]


def shard(trees: Sequence[Tree], *, num_ranks: int, micro_batch_tokens: int) -> list[list[MicroBatch]]:
    """The micro-batches of each rank (see `deal`).

    Every rank gets the same number of them, since ranks meet in collectives: a rank with fewer rows gets rows of one
    token that train nothing.
    """
    dealt = deal(trees, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)
    ranks = [[micro_batch([trees[i] for i in row]) for row in rows] for rows in dealt]
    longest = max(len(rows) for rows in ranks)
    return [rows + [_silent(rows[0])] * (longest - len(rows)) for rows in ranks]


def _silent(row: MicroBatch) -> MicroBatch:
    """A tiny row without trained tokens, for a rank that must take part in one more pass."""
    nothing = np.empty(0, np.int64)
    return MicroBatch(
        token_ids_T=row.token_ids_T[:1],
        lengths=(1,),
        parents=(-1,),
        source_N=nothing,
        target_N=nothing,
        sequence_N=nothing,
        num_sequences=0,
        columns={name: np.empty(0, np.float32) for name in row.columns},
        experts_TLK=None if row.experts_TLK is None else row.experts_TLK[:1],
    )
