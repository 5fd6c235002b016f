"""A stage's devices on a Ray cluster with GPUs: placement groups that hold them, and the Ray options of each actor.

Ranks and engines have one group, with a bundle for each device, in the order of the machines. Judges have a group of
their own, in which a bundle holds all devices of one judge, since its process must see them all: vLLM's Ray executor
refuses a group with such a bundle (`initialize_ray_cluster` in vllm 0.32.0, v1/executor/ray_utils.py).
"""

from collections import Counter
from concurrent.futures import Future
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.placement import DeviceKey, PlacedActor, StagePlacement
from pipeline.errors import RunStopped
from rollout.memory import GPU_SHARE

GROUP_TIMEOUT_SECONDS = 120.0
"""Longest that Ray may take to reserve devices which were free a moment ago."""


class StageDevices:
    """The devices of a running stage.

    placement: what they are for; its machines are Ray's node ids. engines_started: done when the engines have started
    and sleep, since an engine claims its part of a device's free memory, which a rank would take first.
    """

    def __init__(self, placement: StagePlacement) -> None:
        """Reserve the devices of ranks and engines. Raises RunStopped where another run was faster."""
        self.placement = placement
        self.engines_started: Future[None] = Future()
        self._bundles = placement.bundles()
        processes = Counter(actor.devices[0] for actor in placement.actors if actor.kind != "judge")
        resources: list[dict[str, float]] = [{"GPU": 1, "CPU": processes[device]} for device in self._bundles]
        self._group = _reserve(resources, self._bundles) if resources else None
        self._judges: dict[str, PlacementGroup] = {}

    def ranks(self) -> list[dict[str, Any]]:
        """Return the Ray options of every rank."""
        return [self._options(rank) | {"num_gpus": rank.share} for rank in self.placement.of("rank")]

    def engines(self) -> list[dict[str, Any]]:
        """Return the Ray options of every engine's actor.

        An engine on several devices holds none itself: the workers of vLLM's Ray executor take their shares of the
        bundles that these variables name (`_init_executor` in vllm 0.32.0, v1/executor/ray_executor_v2.py).
        """
        return [self._engine(engine) for engine in self.placement.of("engine")]

    def judges(self, suite: str) -> dict[str, list[dict[str, Any]]]:
        """Reserve the devices of a suite's judges, or of the stage's own for "", and return the Ray options of each by
        label. Suites come one after the other, so the devices of the one before are given back."""
        judges = [actor for actor in self.placement.actors if actor.kind == "judge" and actor.suite == suite]
        bundles = list(dict.fromkeys(judge.devices for judge in judges if judge.devices))
        if bundles and suite not in self._judges:
            for other in [name for name in self._judges if name]:
                remove_placement_group(self._judges.pop(other))
            self._judges[suite] = _reserve([{"GPU": len(block)} for block in bundles], [block[0] for block in bundles])
        options: dict[str, list[dict[str, Any]]] = {}
        for judge in judges:
            if judge.devices:
                strategy = PlacementGroupSchedulingStrategy(self._judges[suite], bundles.index(judge.devices))
                gpus = judge.share * len(judge.devices)
                options.setdefault(judge.label, []).append({"num_gpus": gpus, "scheduling_strategy": strategy})
        return options

    def close(self) -> None:
        """Give all devices back."""
        for group in [*self._judges.values(), *([self._group] if self._group else [])]:
            remove_placement_group(group)

    def _options(self, actor: PlacedActor) -> dict[str, Any]:
        assert self._group is not None
        index = self._bundles.index(actor.devices[0])
        return {"num_cpus": 1, "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index)}

    def _engine(self, engine: PlacedActor) -> dict[str, Any]:
        variables, gpus = {GPU_SHARE: str(engine.share)}, engine.share
        if len(engine.devices) > 1:
            indices = ",".join(str(self._bundles.index(device)) for device in engine.devices)
            variables, gpus = variables | {"VLLM_RAY_BUNDLE_INDICES": indices}, 0.0
        return self._options(engine) | {"num_gpus": gpus, "runtime_env": {"env_vars": variables}}


def _reserve(resources: list[dict[str, float]], devices: list[DeviceKey]) -> PlacementGroup:
    """Reserve a bundle of `resources` on the machine of each device."""
    on_node = [{"ray.io/node-id": node} for node, _ in devices]
    group = placement_group(resources, strategy="PACK", bundle_label_selector=on_node)
    if not group.wait(GROUP_TIMEOUT_SECONDS):
        remove_placement_group(group)
        raise RunStopped(
            f"{len(resources)} GPU bundles were not reserved within {GROUP_TIMEOUT_SECONDS:g} s: another run took the "
            "devices; the same command waits for them"
        )
    return group
