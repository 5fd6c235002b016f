"""Micro-batches of each rank, as the ranks lay them out, groups as their driver has them, and a state of all ranks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.data import trees
from pipeline.data.trees import MicroBatch, Tree
from pipeline.train.engine import TrainEngine
from rollout.types import Group, StoredGroup


def shard(batch: Sequence[Tree], *, num_ranks: int, micro_batch_tokens: int) -> list[list[MicroBatch]]:
    """Lay the rows of each rank out."""
    ranks = trees.shard(batch, num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)
    return [[row.micro_batch() for row in rows] for rows in ranks]


def save_state(engine: TrainEngine, folder: Path) -> None:
    """Write the training state into `folder`, with all ranks, and wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.begin_save(folder)
    assert engine.end_save(None)
    torch.distributed.barrier()


def stored(group: Group, completions: Sequence[Any] = (), routes: Any = None) -> StoredGroup:
    """The group as its driver has it, with references to its columns and `routes`; the columns themselves by
    default."""
    references = completions or [done.columns() for done in group.completions]
    known = [replace(done.stored(), columns=own) for done, own in zip(group.completions, references, strict=True)]
    return StoredGroup(group.index, group.prompt_ids, known, routes)


def filled(tree: Tree) -> Tree:
    """A tree of `stored` with its tokens."""
    return replace(tree, branches=[branch.filled(branch.stored) for branch in tree.branches])
