"""The way of sampled tokens on a real Ray, with made-up engines and ranks."""

import pytest
import ray

from jobs.bench.data_plane import pass_tokens
from pipeline.cluster.room import quoted_interpreter


@pytest.mark.timeout(300)
def test_the_driver_sees_texts_and_references_only() -> None:
    """Four bytes a token are the text; ids, log-probabilities and routes would be 164 more."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    try:
        figures = pass_tokens(1, num_tokens=64_000, length=1000)
    finally:
        ray.shutdown()
    assert figures["tokens"] == 64_000 and figures["driver_bytes_per_token"] <= 8
