"""Select the rows of a step as a pure function of step and seed, so that a resumed run needs no state.

Each epoch has its own order. A batch may cross from one epoch into the next.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch lies in one or two epochs
def order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation, int64 [num_rows]; `epoch` counts from 0.

    It sorts the raw stream of a counter-based generator, which is the same in all versions of numpy, unlike numpy's
    `permutation`.
    """
    stream = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num_rows)
    permutation = np.argsort(stream, kind="stable")
    permutation.flags.writeable = False
    return permutation


def refuse_repeats(setting: str, batch_size: int, num_rows: int) -> None:
    """Raise ValueError if a step of `batch_size` rows, set by `setting`, would contain a row twice."""
    if batch_size > num_rows:
        raise ValueError(
            f"{setting}={batch_size} is more than the {num_rows} good rows of the data, so that a step would take some "
            f"of them twice; set it to {num_rows} at most, or give more rows"
        )


def batch_indices(step: int, batch_size: int, num_rows: int, seed: int) -> list[int]:
    """Return the row indices [batch_size] of a step; `step` counts from 1."""
    if num_rows < 1:
        raise ValueError("no rows to take a batch from")
    start = (step - 1) * batch_size
    return [
        int(order(num_rows, seed, position // num_rows)[position % num_rows])
        for position in range(start, start + batch_size)
    ]
