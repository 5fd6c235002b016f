"""Resources that a stage needs, and the reason for which a cluster can't provide them: not now, or never.

On GPUs `pipeline.cluster.placement` gives every actor its devices, or says why it can't. Without GPUs all take turns on
the cores, and a stage's need is the number of threads that it runs at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from configs.base import Settings, walk
from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.graph import validation_gate
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig
from configs.stages import ON_POLICY, AnyStage, Recipe
from configs.train import TrainerConfig
from pipeline.cluster.actors import ActorGroup, Node, describe_nodes
from pipeline.cluster.placement import ActorBytes, StagePlacement, place
from rewards.plugins.names import JUDGE_CACHE_GIB, MODEL_KINDS


@dataclass(frozen=True, slots=True)
class Demand:
    """Resources of a whole stage. separate: engines take other GPUs than ranks."""

    actors: list[ActorGroup]
    separate: bool = False

    @property
    def concurrent(self) -> list[ActorGroup]:
        """The actors that run at a time: of the suites' judges those of one suite, which takes the most GPUs."""
        suites = dict.fromkeys(group.suite for group in self.actors if group.suite)
        largest = max(suites, key=lambda suite: _gpus(g for g in self.actors if g.suite == suite), default="")
        return [group for group in self.actors if group.suite in ("", largest)]

    @property
    def judge_gpus(self) -> int:
        """Whole GPUs of the judges, of which several may share one."""
        return ceil(_gpus(group for group in self.concurrent if group.kind == "judge"))

    @property
    def gpus(self) -> float:
        """GPUs in use at a time, on a cluster with GPUs."""
        ranks, engines = (_gpus(group for group in self.actors if group.kind == kind) for kind in ("rank", "engine"))
        return (ranks + engines if self.separate else max(ranks, engines)) + self.judge_gpus

    def threads(self, cores: float) -> float:
        """CPU threads in use at a time on a machine of `cores` cores: those of the largest group, at least 1."""
        return max(1.0, *(min(group.threads or cores, cores) for group in self.concurrent)) if self.actors else 1.0

    def scarce_resource(self, nodes: Sequence[Node]) -> tuple[float, float]:
        """Return the amounts that the stage needs and that the cluster has of GPUs, or else of cores."""
        gpus = sum(node.gpus for node in nodes)
        cores = sum(node.cpus for node in nodes)
        return (self.gpus, gpus) if gpus else (self.threads(cores), cores)

    def place(self, nodes: Sequence[Node], actor_bytes: ActorBytes | None = None) -> StagePlacement:
        """Give the actors devices among the free ones of `nodes` (see pipeline.cluster.placement.place)."""
        return place(self.actors, nodes, separate=self.separate, actor_bytes=actor_bytes)

    def why_impossible(self, nodes: Sequence[Node]) -> str:
        """Return the reason for which the stage can't run even on the idle cluster; empty where it can."""
        if too_large := self._too_many_gpus_each(nodes) or self._too_much_cache(nodes):
            return too_large
        needed, capacity = self.scarce_resource(nodes)
        claimed, cores = self._claimed_cpus(nodes), sum(node.cpus for node in nodes)
        settings = " or ".join(group.setting for group in self.concurrent if group.gpus)
        nodes_text = describe_nodes(nodes)
        if needed > capacity:
            if self.judge_gpus:
                settings += ", or set args.gpus of a judge: a fraction, or 0 for the CPU"
            return f"asks for {needed:g} GPUs ({self}), the cluster has {capacity:g}: {nodes_text}; lower {settings}"
        if claimed > cores:
            return f"claims {claimed:g} cores ({self}), the cluster has {cores:g}: {nodes_text}; lower {settings}"
        return self._why_unplaced([replace(node, free_gpus=node.gpus) for node in nodes])

    def why_wait(self, nodes: Sequence[Node]) -> str:
        """Return the reason for which the stage has to wait now; empty where its resources are free."""
        free_gpus = sum(int(node.free_gpus) for node in nodes)
        if any(node.gpus for node in nodes) and free_gpus < self.gpus:
            return f"asks for {self.gpus:g} GPUs ({self}), {free_gpus} are free: {describe_nodes(nodes)}"
        if sum(node.free_cpus for node in nodes) < self._claimed_cpus(nodes):
            return f"its processes find no free core: {describe_nodes(nodes)}"
        return self._why_unplaced(nodes)

    def _why_unplaced(self, nodes: Sequence[Node]) -> str:
        try:
            self.place(nodes)
        except ValueError as error:
            return str(error)
        return ""

    def _claimed_cpus(self, nodes: Sequence[Node]) -> float:
        """CPUs that Ray sets aside for the actors; judges claim none."""
        cpus_per_actor = 1 if any(node.gpus for node in nodes) else CPU_SHARE["num_cpus"]
        return sum(group.count for group in self.actors if group.kind != "judge") * cpus_per_actor

    def _too_many_gpus_each(self, nodes: Sequence[Node]) -> str:
        """Return the refusal of an actor that spreads over more GPUs than any machine has; else an empty text."""
        largest = max((int(node.gpus) for node in nodes), default=0)
        for group in self.actors:
            if group.gpus_setting and group.gpus > max(largest, 1) and not (group.spans_nodes and largest):
                span = ", or rollout.span_nodes to true" if group.kind == "engine" and largest else ""
                return (
                    f"{group.gpus_setting}={group.gpus:g} takes {group.gpus:g} GPUs of one machine for each "
                    f"{group.noun}, there is "
                    f"{f'none with more than {largest}' if largest else 'none with a GPU'}: {describe_nodes(nodes)}; "
                    f"set it to {max(largest, 1)}{span}"
                )
        return ""

    def _too_much_cache(self, nodes: Sequence[Node]) -> str:
        """Return the refusal of KV caches that exceed the machines' memory; else an empty text, as on GPUs, where the
        cache lies in their own memory."""
        if any(node.gpus for node in nodes):
            return ""
        sizes: list[tuple[ActorGroup, float]] = []
        for group in self.concurrent:
            if group.kv_cache_gib == "auto":
                return f"{group.kv_cache_setting}=auto is a share of a GPU's memory, and there is none; set it to GiB"
            sizes += [(group, group.kv_cache_gib)] if group.kv_cache_gib else []
        cache_gib = sum(group.count * size for group, size in sizes)
        memory_gib = sum(node.memory for node in nodes) / 2**30
        if cache_gib <= memory_gib:
            return ""
        settings = ", ".join(f"{group.kv_cache_setting}={size:g} for {group}" for group, size in sizes)
        return f"{settings}: {cache_gib:g} GiB of memory in all, {describe_nodes(nodes)} has {memory_gib:.1f}; lower it"

    def __str__(self) -> str:
        return ", ".join(map(str, self.concurrent)) or "no processes"


CPU_SHARE = {"num_cpus": 0.1}
"""Ray resources of a rank or engine without GPUs: a tenth of a CPU, since they take turns on all cores."""


def stage_demand(config: AnyStage, recipe: Recipe | None = None) -> Demand:
    """Count the actors that a stage starts, with the judges of the gate in `recipe` that validates it. Judging by rules
    costs little and is not counted.

    Example:
        stage_demand(recipe.stages["reason"], recipe).why_impossible(nodes())
    """
    separate = isinstance(config, ON_POLICY) and config.placement == "separate"
    return Demand(list(_actor_groups(config, recipe)), separate)


def _gpus(groups: Iterable[ActorGroup]) -> float:
    return sum(group.count * group.gpus for group in groups)


def _actor_groups(config: AnyStage, recipe: Recipe | None) -> Iterator[ActorGroup]:
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    if trainer is not None:
        yield ActorGroup("rank", trainer.num_ranks, 1, trainer.num_ranks * trainer.threads, "trainer.num_ranks")
    rollout: RolloutConfig | None = getattr(config, "rollout", None)
    if rollout is not None:
        yield ActorGroup(
            "engine",
            rollout.num_engines,
            rollout.tensor_parallel_size,
            rollout.num_engines * rollout.threads,
            "rollout.num_engines",
            gpus_setting="rollout.tensor_parallel_size",
            spans_nodes=rollout.span_nodes,
            kv_cache_gib=rollout.kv_cache_gib,
            kv_cache_setting="rollout.kv_cache_gib",
        )
    evaluation: AnyStage | None = config
    if not isinstance(config, EvalConfig | GateConfig):
        yield from _judges(_reward_specs(config), getattr(config, "reward_pool", None))
        evaluation = validation_gate(config, recipe) if recipe else None
    if isinstance(evaluation, EvalConfig | GateConfig):
        for name, suite in evaluation.suites.items():
            yield from _judges(_reward_specs(suite), evaluation.reward_pool, name)


def _judges(specs: Iterable[RewardSpec], pool: RewardPoolConfig | None, suite: str = "") -> Iterator[ActorGroup]:
    for spec in specs:
        if spec.name in MODEL_KINDS and pool is not None:
            has_engine = spec.name == "self_judge" or spec.args.get("backend") == "vllm"
            workers = pool.workers.get(spec.label, 1)
            yield ActorGroup(
                "judge",
                workers,
                float(1.0 if spec.args.get("gpus") is None else spec.args["gpus"]),
                workers * int(spec.args.get("threads", 1)),
                f"reward_pool.workers.{spec.label}",
                gpus_setting="args.gpus",
                label=spec.label,
                checkpoint=str(spec.args.get("path", "")),
                dtype=str(spec.args.get("dtype", "float32")),
                fp8=tuple(spec.args.get("fp8", ())),
                max_length=spec.args.get("max_length"),
                suite=suite,
                kv_cache_gib=float(spec.args.get("kv_cache_gib", JUDGE_CACHE_GIB)) if has_engine else 0.0,
                kv_cache_setting="args.kv_cache_gib",
            )


def _reward_specs(config: Settings) -> list[RewardSpec]:
    return [node for _, node in walk(config) if isinstance(node, RewardSpec)]
