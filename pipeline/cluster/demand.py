"""Resources that a stage needs, and the reason for which a cluster can't provide them: not now, or never.

On GPUs a training rank and an engine share one, half each, and take turns; a reward model has its own. Without GPUs all
take turns on the cores, and a stage's need is the number of threads that it runs at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from configs.base import Settings, walk
from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.graph import validation_gate
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from configs.stages import AnyStage, Recipe
from configs.train import TrainerConfig
from rewards.plugins.names import MODEL_KINDS


@dataclass(frozen=True, slots=True)
class ActorGroup:
    """Actors of one kind that a stage starts.

    gpus: GPUs of all of them, on a cluster with GPUs.
    threads: CPU threads of all of them, without GPUs; 0 takes every core.
    setting: the setting to lower where they don't fit.
    colocated: they take turns with other actors on the same devices.
    gpus_setting: the setting that spreads one actor over several GPUs of a machine; empty for none.
    kv_cache_gib: GiB of KV cache of one actor, and the setting of it.
    """

    noun: str
    count: int
    gpus: float
    threads: int
    setting: str
    colocated: bool = True
    gpus_setting: str = ""
    kv_cache_gib: float = 0.0
    kv_cache_setting: str = ""

    def __str__(self) -> str:
        return f"{self.count} {self.noun}{'s' * (self.count > 1)}"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster. The free amounts are those that no actor has claimed; memory is in bytes."""

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    memory: float = float("inf")

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.name} ({self.gpus:g} GPUs, {self.free_gpus:g} free)"
        return f"{self.name} ({self.cpus:g} cores, {self.free_cpus:g} unclaimed)"


@dataclass(frozen=True, slots=True)
class Demand:
    """Resources of a whole stage."""

    actors: list[ActorGroup]

    @property
    def gpus(self) -> float:
        """GPUs in use at a time, on a cluster with GPUs."""
        colocated = max((group.gpus for group in self.actors if group.colocated), default=0)
        return colocated + sum(group.gpus for group in self.actors if not group.colocated)

    def threads(self, cores: float) -> float:
        """CPU threads in use at a time on a machine of `cores` cores: those of the largest group, at least 1."""
        return max(1.0, *(min(group.threads or cores, cores) for group in self.actors)) if self.actors else 1.0

    def scarce_resource(self, nodes: Sequence[Node]) -> tuple[float, float]:
        """Return the amounts that the stage needs and that the cluster has of GPUs, or else of cores."""
        gpus = sum(node.gpus for node in nodes)
        cores = sum(node.cpus for node in nodes)
        return (self.gpus, gpus) if gpus else (self.threads(cores), cores)

    def why_impossible(self, nodes: Sequence[Node]) -> str:
        """Return the reason for which the stage can't run even on the idle cluster; empty where it can."""
        if too_large := self._too_many_gpus_each(nodes) or self._too_much_cache(nodes):
            return too_large
        needed, capacity = self.scarce_resource(nodes)
        claimed, cores = self._claimed_cpus(nodes), sum(node.cpus for node in nodes)
        settings = " or ".join(group.setting for group in self.actors if group.gpus)
        nodes_text = describe_nodes(nodes)
        if needed > capacity:
            return f"asks for {needed:g} GPUs ({self}), the cluster has {capacity:g}: {nodes_text}; lower {settings}"
        if claimed > cores:
            return f"claims {claimed:g} cores ({self}), the cluster has {cores:g}: {nodes_text}; lower {settings}"
        return ""

    def why_wait(self, nodes: Sequence[Node]) -> str:
        """Return the reason for which the stage has to wait now; empty where its resources are free."""
        free_gpus = sum(int(node.free_gpus) for node in nodes)
        if any(node.gpus for node in nodes) and free_gpus < self.gpus:
            return f"asks for {self.gpus:g} GPUs ({self}), {free_gpus} are free: {describe_nodes(nodes)}"
        if sum(node.free_cpus for node in nodes) < self._claimed_cpus(nodes):
            return f"its processes find no free core: {describe_nodes(nodes)}"
        return ""

    def _claimed_cpus(self, nodes: Sequence[Node]) -> float:
        """CPUs that Ray sets aside for the actors; judges claim none."""
        cpus_per_actor = actor_resources(gpus=any(node.gpus for node in nodes))["num_cpus"]
        return sum(group.count for group in self.actors if group.colocated) * cpus_per_actor

    def _too_many_gpus_each(self, nodes: Sequence[Node]) -> str:
        """Return the refusal of an actor that spreads over more GPUs than any machine has; else an empty text."""
        largest = max((int(node.gpus) for node in nodes), default=0)
        for group in self.actors:
            gpus = group.gpus / group.count
            if group.gpus_setting and gpus > max(largest, 1):
                return (
                    f"{group.gpus_setting}={gpus:g} takes {gpus:g} GPUs of one machine for each {group.noun}, there is "
                    f"{f'none with more than {largest}' if largest else 'none with a GPU'}: {describe_nodes(nodes)}; "
                    f"set it to {max(largest, 1)}"
                )
        return ""

    def _too_much_cache(self, nodes: Sequence[Node]) -> str:
        """Return the refusal of KV caches that exceed the machines' memory; else an empty text, as on GPUs, where the
        cache lies in their own memory."""
        groups = [group for group in self.actors if group.kv_cache_gib]
        cache_gib = sum(group.count * group.kv_cache_gib for group in groups)
        memory_gib = sum(node.memory for node in nodes) / 2**30
        if any(node.gpus for node in nodes) or cache_gib <= memory_gib:
            return ""
        settings = ", ".join(f"{group.kv_cache_setting}={group.kv_cache_gib:g} for {group}" for group in groups)
        return f"{settings}: {cache_gib:g} GiB of memory in all, {describe_nodes(nodes)} has {memory_gib:.1f}; lower it"

    def __str__(self) -> str:
        return ", ".join(map(str, self.actors)) or "no processes"


def stage_demand(config: AnyStage, recipe: Recipe | None = None) -> Demand:
    """Count the actors that a stage starts, with the judges of the gate in `recipe` that validates it. Judging by rules
    costs little and is not counted.

    Example:
        stage_demand(recipe.stages["reason"], recipe).why_impossible(nodes())
    """
    return Demand(list(_actor_groups(config, recipe)))


def actor_resources(*, gpus: bool) -> dict[str, Any]:
    """Ray resources of one training rank or engine: half a GPU, since they share them in pairs. Without GPUs a tenth of
    a CPU, since they take turns on all cores."""
    return {"num_cpus": 1, "num_gpus": 0.5} if gpus else {"num_cpus": 0.1}


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Describe the nodes with their GPUs, or else their cores."""
    return ", ".join(map(str, nodes))


def _actor_groups(config: AnyStage, recipe: Recipe | None) -> Iterator[ActorGroup]:
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    if trainer is not None:
        ranks = trainer.num_ranks
        yield ActorGroup("training rank", ranks, ranks, ranks * trainer.threads, "trainer.num_ranks")
    rollout: RolloutConfig | None = getattr(config, "rollout", None)
    if rollout is not None:
        engines = rollout.num_engines
        yield ActorGroup(
            "engine",
            engines,
            engines * rollout.tensor_parallel_size,
            engines * rollout.threads,
            "rollout.num_engines",
            gpus_setting="rollout.tensor_parallel_size",
            kv_cache_gib=rollout.kv_cache_gib,
            kv_cache_setting="rollout.kv_cache_gib",
        )
    evaluation: AnyStage | None = config
    if not isinstance(config, EvalConfig | GateConfig):
        yield from _judges(_reward_specs(config), getattr(config, "reward_pool", None))
        evaluation = validation_gate(config, recipe) if recipe else None
    if isinstance(evaluation, EvalConfig | GateConfig):
        # Suites run one after the other, each with its own judges.
        by_suite = [list(_judges(_reward_specs(suite), evaluation.reward_pool)) for suite in evaluation.suites.values()]
        yield from max(by_suite, key=lambda judges: sum(group.gpus for group in judges), default=[])


def _judges(specs: Iterable[RewardSpec], pool: RewardPoolConfig | None) -> Iterator[ActorGroup]:
    for spec in specs:
        if spec.name in MODEL_KINDS and pool is not None:
            workers = pool.workers.get(spec.label, 1)
            yield ActorGroup(
                f"'{spec.label}' judge",
                workers,
                workers * float(1.0 if spec.args.get("gpus") is None else spec.args["gpus"]),
                workers * int(spec.args.get("threads", 1)),
                f"reward_pool.workers.{spec.label}",
                colocated=False,
                gpus_setting="args.gpus",
                kv_cache_gib=float(spec.args.get("kv_cache_gib", 0.0)),
                kv_cache_setting="args.kv_cache_gib",
            )


def _reward_specs(config: Settings) -> list[RewardSpec]:
    return [node for _, node in walk(config) if isinstance(node, RewardSpec)]
