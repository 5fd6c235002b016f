"""Pack trees of tokens into micro-batches for training.

A tree is a prompt and the branches that continue it. A GRPO group has G branches, a comparison one branch for each
answer, and a conversation is a root alone. The root is computed once for all branches of a row; a tree that is longer
than a row is cut into parts, each with the root and some of the branches. Everything is flat numpy, so a micro-batch is
sent to a rank without a copy.

Legend: T tokens of a packed row, N trained tokens or scored answers, S trained sequences or comparisons, L mixture
layers, K experts a token is sent to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.data.packing import pack, split_by_tokens
from rollout.types import CompletionColumns, KeptTokens, Routes, StoredGroup

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that continue a root, all of them trained; of a scored tree, only the last token is read.

    columns: values by name (`advantages`, `weights`, ...), one for each trained token, or one for a scored branch.
    experts: the routes to replay, if any. kept: the tokens that each was sampled from, None for the vocabulary.
    stored: reference to the CompletionColumns that have the tokens; of token_ids only the length then counts, and
    columns have one value for all tokens (see `stored_tree`). With `version`, that of the weights in training, each
    token gets the column `no_lag`: 1 where these weights sampled it, else 0.
    """

    token_ids: Sequence[int]
    columns: Mapping[str, Sequence[float] | Floats] = field(default_factory=dict[str, Sequence[float]])
    experts: Routes | None = None
    kept: KeptTokens | None = None
    stored: Any = None

    def filled(self, completion: CompletionColumns) -> "Branch":
        """Return a stored branch with its tokens, their log-probabilities, routes and kept tokens."""
        columns: dict[str, Sequence[float] | Floats] = {"rollout_logprobs": completion.logprobs}
        for name, [value] in self.columns.items():
            columns[name] = np.full(len(completion.token_ids), value, np.float32)
        if "version" in columns:
            columns["no_lag"] = (completion.token_versions == columns.pop("version")).astype(np.float32)
        ids = cast(Sequence[int], completion.token_ids)  # micro_batch reads arrays and lists alike
        return Branch(ids, columns, completion.routed_experts, completion.kept_tokens)


@dataclass(frozen=True, slots=True)
class Tree:
    """A root and its branches.

    root_mask: 1 for the root's own tokens that are trained (never the first). scored: the branches are one comparison,
    and the last token of each is read. compared: the branches are one comparison of which all tokens are trained.
    root_experts: given if the branches have routes. root_repeated: another part of the same tree has the root too (see
    `cut`). root_stored: reference to the root's routes.

    Example: `Tree([1, 5, 6], [Branch([7, 2]), Branch([8, 9, 2])])` is a prompt with two completions.
    """

    root_ids: Sequence[int]
    branches: list[Branch] = field(default_factory=list[Branch])
    root_mask: list[int] | None = None
    scored: bool = False
    compared: bool = False
    root_experts: Routes | None = None
    root_repeated: bool = False
    root_stored: Any = None

    @property
    def num_tokens(self) -> int:
        return len(self.root_ids) + sum(len(branch.token_ids) for branch in self.branches)

    @property
    def num_values(self) -> int:
        """Trained tokens, or scored answers: the tree's share of the N of a row."""
        return len(self.branches) if self.scored else self.num_tokens - len(self.root_ids) + sum(self.root_mask or [])

    def references(self) -> list[Any]:
        """Return the references to columns and routes."""
        stored = [self.root_stored, *(branch.stored for branch in self.branches)]
        return [reference for reference in stored if reference is not None]

    def filled(self, stored: Mapping[Any, Any]) -> "Tree":
        """Return the tree with what its references lead to, by reference."""
        if not self.references():
            return self
        branches = [branch.filled(stored[branch.stored]) for branch in self.branches]
        root_experts = None if self.root_stored is None else stored[self.root_stored]
        return replace(self, branches=branches, root_experts=root_experts, root_stored=None)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row of a forward pass.

    A prompt p with completions a and b, and a conversation q of which q1 is trained:

        token_ids_T  [ p0 p1 p2 | a0 a1 | b0 b1 b2 | q0 q1 ]
        lengths      [    3     |   2   |    3     |   2   ]
        parents      [   -1     |   0   |    0     |  -1   ]   as in pipeline.models.attention.Layout

        target_N     [ a0 a1 | b0 b1 b2 | q1 ]   trained token i
        source_N     [  2  3 |  2  5  6 |  8 ]   the row of T whose hidden state predicts it
        sequence_N   [  0  0 |  1  1  1 |  2 ]   its sequence, < num_sequences
        columns      [  .  . |  .  .  . |  . ]   float32 [N] by name

    Element i of a scored tree is an answer: target_N[i] is its last token, source_N[i] the row of that token, and
    sequence_N[i] its comparison. experts_TLK are the experts to replay, if any (see rollout.types.Routes), `kept`
    the tokens that each trained one was sampled from, if not from all. `repeated` are the segments that another row has
    too, whose tokens count there.
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
    repeated: tuple[int, ...] = ()
    kept: KeptTokens | None = None

    @property
    def num_new_tokens(self) -> int:
        """The number of tokens without those of repeated segments."""
        return len(self.token_ids_T) - sum(self.lengths[segment] for segment in self.repeated)

    @property
    def comparison_S(self) -> Ints:
        """The comparison of each sequence, from 0 on, in a row of `compared` trees: sequences are their branches."""
        return np.unique([parent for parent in self.parents if parent >= 0], return_inverse=True)[1]

    def with_column(self, name: str, values_N: Floats) -> "MicroBatch":
        """Return the micro-batch with one more column."""
        assert values_N.shape == self.target_N.shape
        return replace(self, columns=self.columns | {name: values_N})


def micro_batch(trees: Sequence[Tree]) -> MicroBatch:
    """Lay trees out as one row."""
    token_ids, lengths, parents, repeated = [], [], [], []
    source, target, sequence, columns = [], [], [], []
    routes: list[Routes | None] = []
    kept = [branch.kept for tree in trees for branch in tree.branches if branch.kept is not None]
    start = num_sequences = 0
    for tree in trees:
        root = len(lengths)
        token_ids.append(tree.root_ids)
        routes.append(tree.root_experts)
        lengths.append(len(tree.root_ids))
        parents.append(-1)
        if tree.root_repeated:
            repeated.append(root)
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
            token_ids.append(branch.token_ids)
            routes.append(branch.experts)
            lengths.append(length)
            parents.append(root)
            predicting = np.concatenate([[last_of_root], np.arange(start, start + length - 1)])
            rows = np.array([start + length - 1]) if tree.scored else predicting
            source.append(rows)
            target.append(np.asarray(branch.token_ids, np.int64)[-len(rows) :])
            sequence.append(np.full(len(rows), num_sequences))
            columns.append(branch.columns)
            num_sequences += not tree.scored
            start += length
        num_sequences += tree.scored
    experts = [experts_TLK for experts_TLK in routes if experts_TLK is not None]
    assert not experts or len(experts) == len(routes), "routes of some segments are missing; -1 marks an unknown route"
    return MicroBatch(
        token_ids_T=np.concatenate([np.asarray(ids, np.int64) for ids in token_ids]),
        lengths=tuple(lengths),
        parents=tuple(parents),
        source_N=np.concatenate(source).astype(np.int64),
        target_N=np.concatenate(target),
        sequence_N=np.concatenate(sequence).astype(np.int64),
        num_sequences=num_sequences,
        columns={
            name: np.concatenate([np.asarray(values[name], np.float32) for values in columns])
            for name in (columns[0] if columns else {})
        },
        experts_TLK=np.concatenate(experts) if experts else None,
        repeated=tuple(repeated),
        kept=KeptTokens.joined(kept) if kept else None,
    )


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Trees that are laid out as one row. Of a row that is not `trained` only the first token is computed, so that a
    rank without work meets the others in collectives."""

    trees: list[Tree]
    trained: bool = True

    @property
    def num_new_tokens(self) -> int:
        """The number of tokens without those of repeated roots; 0 of a row that is not trained."""
        return sum(tree.num_tokens - tree.root_repeated * len(tree.root_ids) for tree in self.trees) * self.trained

    @property
    def num_values(self) -> int:
        """Trained tokens, or scored answers."""
        return sum(tree.num_values for tree in self.trees) * self.trained

    def micro_batch(self, stored: Mapping[Any, Any] = MappingProxyType({})) -> MicroBatch:
        """Lay the row out. stored: what the references of its trees lead to, by reference."""
        row = micro_batch([tree.filled(stored) for tree in self.trees])
        return row if self.trained else _untrained_row(row)


def stored_tree(group: StoredGroup, columns: Mapping[int, Mapping[str, float]]) -> Tree:
    """Build the tree of the completions of `group` that have `columns`: by their index, the value of all their tokens
    by name."""
    branches: list[Branch] = []
    for index, by_name in columns.items():
        completion = group.completions[index]
        values = {name: [value] for name, value in by_name.items()}
        branches.append(Branch(range(completion.num_tokens), values, stored=completion.columns))
    return Tree(group.prompt_ids, branches, root_stored=group.routed_experts)


def cut(tree: Tree, max_tokens: int) -> list[Tree]:
    """Cut a tree into parts of at most `max_tokens` tokens, each with the root and whole branches.

    A part of a single branch may be longer. A comparison stays whole, because its loss is not a sum over branches.

    Example: `cut(Tree([1, 5], [Branch([7, 2]), Branch([8, 2])]), 4)` is
    `[Tree([1, 5], [Branch([7, 2])]), Tree([1, 5], [Branch([8, 2])], root_repeated=True)]`.
    """
    if tree.scored or tree.compared or tree.num_tokens <= max_tokens or len(tree.branches) < 2:
        return [tree]
    parts = pack([len(branch.token_ids) for branch in tree.branches], max_tokens - len(tree.root_ids))
    first, *others = [replace(tree, branches=[tree.branches[i] for i in part]) for part in parts]
    return [first, *(replace(part, root_mask=None, root_repeated=True) for part in others)]


def scored_tree(
    prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], targets: Sequence[float] | None = None
) -> Tree:
    """Build a prompt with answers that are each scored at their last token, with target scores for training."""
    columns: list[dict[str, Sequence[float]]] = [{"targets": [x]} for x in targets] if targets else [{}] * len(answers)
    return Tree(prompt_ids, [Branch(*branch) for branch in zip(answers, columns, strict=True)], scored=True)


def compared_tree(
    prompt_ids: list[int],
    answers: Sequence[list[int]],
    targets: Sequence[float] | None = None,
    reference: Sequence[Floats] | None = None,
) -> Tree:
    """Build a prompt with compared answers whose tokens are all trained, those of an answer with its target score and,
    if given, with the reference's log-probabilities."""
    columns: list[dict[str, Sequence[float]]] = [{} for _ in answers]
    for index, answer in enumerate(answers):
        if targets is not None:
            columns[index]["targets"] = [targets[index]] * len(answer)
        if reference is not None:
            columns[index]["ref_logprobs"] = reference[index].tolist()
    return Tree(prompt_ids, [Branch(*branch) for branch in zip(answers, columns, strict=True)], compared=True)


def shard_indices(trees: Sequence[Tree], *, num_ranks: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Return the indices of trees by rank and row: balanced over ranks by tokens, then packed into rows.

    A row has at most `micro_batch_tokens` tokens, or one longer tree.
    """
    sizes = [tree.num_tokens for tree in trees]
    return [
        [[indices[i] for i in row] for row in pack([sizes[i] for i in indices], micro_batch_tokens)]
        for indices in split_by_tokens(sizes, num_ranks)
    ]


def shard(trees: Sequence[Tree], *, num_ranks: int, micro_batch_tokens: int) -> list[list[PackedRow]]:
    """Return the rows of each rank (see `cut` and `shard_indices`).

    Fewer trees than ranks are cut into a part for each rank, as far as they have branches. Ranks meet in collectives,
    so all get the same number: a rank with fewer rows gets rows that are not trained.
    """
    parts_each = -(-num_ranks // len(trees))

    def most_tokens(tree: Tree) -> int:
        branch_tokens = tree.num_tokens - len(tree.root_ids)
        return min(micro_batch_tokens, len(tree.root_ids) + max(branch_tokens // parts_each, 1))

    trees = [part for tree in trees for part in cut(tree, most_tokens(tree))]
    indices = shard_indices(trees, num_ranks=min(num_ranks, len(trees)), micro_batch_tokens=micro_batch_tokens)
    ranks = [[PackedRow([trees[i] for i in row]) for row in rows] for rows in indices]
    ranks += [[] for _ in range(num_ranks - len(ranks))]
    longest = max(len(rows) for rows in ranks)
    return [
        rows + [PackedRow((rows or ranks[0])[0].trees[:1], trained=False)] * (longest - len(rows)) for rows in ranks
    ]


def values_in_order(
    trees: Sequence[Tree], results: Sequence[Sequence[Floats]], micro_batch_tokens: int
) -> list[Floats]:
    """Return the values of each tree, in the order of `trees`, none of which is ever cut.

    results: the values of each rank's rows, as `shard` made them; rows without a tree come last.
    """
    values: dict[int, Floats] = {}
    indices = shard_indices(trees, num_ranks=len(results), micro_batch_tokens=micro_batch_tokens)
    for rank_indices, rank_values in zip(indices, results, strict=True):
        for row_indices, values_N in zip(rank_indices, rank_values, strict=False):
            ends = np.cumsum([trees[index].num_values for index in row_indices])[:-1]
            values |= zip(row_indices, np.split(values_N, ends), strict=True)
    return [values[index] for index in range(len(trees))]


def _untrained_row(row: MicroBatch) -> MicroBatch:
    """Return the first token of `row` as a row without trained tokens."""
    empty = np.empty(0, np.int64)
    return MicroBatch(
        token_ids_T=row.token_ids_T[:1],
        lengths=(1,),
        parents=(-1,),
        source_N=empty,
        target_N=empty,
        sequence_N=empty,
        num_sequences=0,
        columns={name: np.empty(0, np.float32) for name in row.columns},
        experts_TLK=None if row.experts_TLK is None else row.experts_TLK[:1],
        kept=None if row.kept is None else KeptTokens(row.kept.token_ids[:0], row.kept.counts[:0]),
    )
