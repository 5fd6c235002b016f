"""Log-probabilities of a frozen reference, computed once before training and kept, so that no reference is loaded."""

import shutil
from pathlib import Path

import numpy as np

from pipeline.data.comparisons import Comparisons
from pipeline.data.trees import Floats, compared_tree
from pipeline.disk.files import fsync
from pipeline.disk.hashes import text_hash
from pipeline.train.worker import TrainingRanks

COMPARISONS_PER_PART = 256
"""Comparisons in one call of the ranks, which must finish it within their timeout, and in one file."""


def reference_logprobs(folder: Path, data: Comparisons, ranks: TrainingRanks, reference: str) -> list[list[Floats]]:
    """Read the reference's log-probabilities of `data` from `folder`, and compute those that are not there: of each
    comparison, of the tokens of each answer.

    `ranks` must hold the reference, as they do before a stage restores its checkpoint. reference: hash of the
    checkpoint and of what else its log-probabilities depend on. The files lie in a folder named by the hash of the
    reference and the data's tokens; those of another reference or other data are removed.
    """
    parts = folder / text_hash(f"{reference} {data.token_hash()}")[:16]
    for other in folder.glob("*"):
        if other != parts:
            shutil.rmtree(other)
    parts.mkdir(parents=True, exist_ok=True)
    logprobs: list[list[Floats]] = []
    for part, tokenized in enumerate(data.parts(COMPARISONS_PER_PART)):
        lengths = [len(answer) for comparison in tokenized for answer in comparison.answer_ids]
        file = parts / f"{part * COMPARISONS_PER_PART:09}.npy"
        if (values_N := _read(file, sum(lengths))) is None:
            trees = [compared_tree(comparison.prompt_ids, comparison.answer_ids) for comparison in tokenized]
            values_N = np.concatenate([values for answers in ranks.answer_logprobs(trees) for values in answers])
            partial = file.with_suffix(".partial.npy")
            np.save(partial, values_N)
            fsync(partial)
            partial.replace(file)
        answers = iter(np.split(values_N, np.cumsum(lengths)[:-1]))
        logprobs += [[next(answers) for _ in comparison.answer_ids] for comparison in tokenized]
    return logprobs


def _read(file: Path, num_values: int) -> Floats | None:
    """Read a part; None if it is missing or cut short."""
    try:
        values_N = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return values_N if values_N.shape == (num_values,) else None
