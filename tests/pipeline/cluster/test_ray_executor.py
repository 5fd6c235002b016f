"""An engine over two devices by vLLM's own Ray executor: real workers, in the bundles of a stage, on the CPU."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

from configs.sampling import RolloutConfig
from pipeline.cluster import start
from pipeline.cluster.actors import ActorGroup
from pipeline.cluster.placement import StagePlacement, place
from pipeline.cluster.room import nodes, quoted_interpreter
from rollout.actors import EngineActor
from tests.rollout import tiny

pytestmark = pytest.mark.engine

CONFIG = tiny.CONFIG.model_copy(update={"tensor_parallel_size": 2})


class LogicalEngine(EngineActor):
    """The product's actor, whose platform and workers are those of tests.pipeline.cluster.ray_workers."""

    def start(self, sharers: int, model: Path, config: RolloutConfig, *args: Any, **kwargs: Any) -> list[str]:
        import rollout.engine  # noqa: F401  sets vLLM up before it is imported
        from tests.pipeline.cluster.ray_workers import use_logical_workers

        use_logical_workers()
        return super().start(sharers, model, config, *args, **kwargs)

    def workers(self) -> list[tuple[str, int]]:
        from tests.pipeline.cluster.ray_workers import devices_of_workers

        return devices_of_workers(self._engine._llm)


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray.init(num_gpus=3, num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    monkeypatch.setattr("rollout.actors.EngineActors.actor", LogicalEngine)
    monkeypatch.setattr(start, "cluster", nullcontext)
    yield
    ray.shutdown()


def placement() -> StagePlacement:
    """A rank has the first device to itself, the engine the other two."""
    groups = [
        ActorGroup("rank", 1, 1, 0, "trainer.num_ranks"),
        ActorGroup("engine", 1, 2, 0, "rollout.num_engines", "rollout.tensor_parallel_size"),
    ]
    return place(groups, nodes(), separate=True)


def test_workers_sit_in_the_bundles_of_their_engine_and_compute_as_one(three_gpus: None, tmp_path: Path) -> None:
    """In a float32 model of DeepSeek's attention, which vLLM computes wrongly on the CPU without our plug-in."""
    model = tiny.moe(0)
    folder = tiny.save(model, tmp_path / "model")
    with (
        start.cluster_when_needed(placement),
        start.start_all(lambda: start.start_rollout(folder, CONFIG, dtype="float32", seed=0)) as (pool,),
    ):
        [workers] = ray.get([engine.workers.remote() for engine in pool._engines], timeout=60)
        assert [gpu for _, gpu in workers] == [1, 2]
        [logprobs] = pool.prompt_logprobs(tiny.PROMPTS)
    assert tiny.within_bounds(tiny.prompt_gap(model, logprobs))
