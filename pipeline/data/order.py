"""Which rows a step takes: a pure function of step and seed, so that a resumed run needs no state to go on.

Epochs follow one another without a seam, each in its own order; rows left over at the end of one begin the next batch.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch lies in one epoch or across two
def order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """[num_rows] int64, a permutation. `epoch` counts from 0.

    Sorts the raw stream of a counter-based generator, which numpy keeps the same in all versions; it does not promise
    that of its `permutation`.
    """
    stream = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num_rows)
    permutation = np.argsort(stream, kind="stable")
    permutation.flags.writeable = False
    return permutation


def refuse_repeats(setting: str, batch_size: int, num_rows: int) -> None:
    """Raises ValueError where a step of `batch_size` rows, which `setting` sets, would take a row of the data twice."""
    if batch_size > num_rows:
        raise ValueError(
            f"{setting}={batch_size} is more than the {num_rows} good rows of the data, so that a step would take some "
            f"of them twice; set it to {num_rows} at most, or give more rows"
        )


def batch_indices(step: int, batch_size: int, num_rows: int, seed: int) -> list[int]:
    """[batch_size] row numbers of a step; `step` counts from 1."""
    if num_rows < 1:
        raise ValueError("no rows to take a batch from")
    start = (step - 1) * batch_size
    return [
        int(order(num_rows, seed, position // num_rows)[position % num_rows])
        for position in range(start, start + batch_size)
    ]
