"""Seeds of completions: functions of a request's seed, the prompt's place in it and the index in the group."""

from collections.abc import Sequence

import numpy as np


def prompt_seeds(seed: int, places: Sequence[int]) -> list[int]:
    """Return the seeds of the prompts at `places` of a request.

    vLLM adds the index in the group (vllm/v1/engine/parallel_sampling.py), and its runner for GPUs keeps the sum as
    int64 (vllm/v1/worker/gpu/sample/states.py), so seeds are below 2^62.
    """
    stream = np.random.Philox(key=seed).random_raw(max(places, default=0) + 1)
    return [int(stream[place] >> 2) for place in places]
