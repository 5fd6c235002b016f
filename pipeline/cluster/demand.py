"""What a stage asks of a cluster, and whether the cluster can give it: now, later, or never.

On GPUs a rank and an engine share one, half each, and take turns; a reward model has its own. Without GPUs everybody
takes turns on the cores, and what counts is how many threads a stage runs at a time.
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
from rewards.plugins import MODEL_KINDS


@dataclass(frozen=True, slots=True)
class Actors:
    """Processes of one kind that a stage starts."""

    noun: str
    count: int
    gpus: float
    """GPUs all of them take, where there are GPUs."""
    threads: int
    """CPU threads all of them run, where there are none; 0 takes every core."""
    setting: str
    """What to lower where they don't fit."""
    shares: bool = True
    """Whether they take turns with the others on the same devices."""
    spread: str = ""
    """The setting that spreads each of them over several GPUs of one machine; empty where none does."""
    kv_cache_gib: float = 0.0
    """GiB of KV cache that each takes."""
    kv_cache_setting: str = ""
    """The setting that sets it."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what nobody has claimed of it."""

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    memory: float = float("inf")
    """Bytes that it has in all, as far as they are known."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a whole stage asks."""

    actors: list[Actors]

    @property
    def gpus(self) -> float:
        """GPUs at a time, where there are GPUs."""
        taking_turns = max((some.gpus for some in self.actors if some.shares), default=0)
        return taking_turns + sum(some.gpus for some in self.actors if not some.shares)

    def threads(self, cores: float) -> float:
        """CPU threads at a time on a machine of so many cores: of those who take turns the most, at least 1."""
        return max(1.0, *(min(some.threads or cores, cores) for some in self.actors)) if self.actors else 1.0

    def share(self, nodes: Sequence[Node]) -> tuple[float, float]:
        """(what it takes, what the cluster has) of what is scarce there: GPUs, or else cores."""
        gpus = sum(node.gpus for node in nodes)
        cores = sum(node.cpus for node in nodes)
        return (self.gpus, gpus) if gpus else (self.threads(cores), cores)

    def never(self, nodes: Sequence[Node]) -> str:
        """The reason that the cluster can't run the stage even when nothing else runs on it; empty where it can."""
        if too_large := self._too_wide(nodes) or self._too_much_cache(nodes):
            return too_large
        asked, there = self.share(nodes)
        settings = " or ".join(some.setting for some in self.actors if some.gpus)
        if asked > there:
            return f"asks for {asked:g} GPUs ({self}), the cluster has {there:g}: {machines(nodes)}; lower {settings}"
        cores, claimed = sum(node.cpus for node in nodes), claims(self.actors, gpus=any(node.gpus for node in nodes))
        if claimed > cores:
            return f"claims {claimed:g} cores ({self}), the cluster has {cores:g}: {machines(nodes)}; lower {settings}"
        return ""

    def _too_wide(self, nodes: Sequence[Node]) -> str:
        """The refusal of processes that spread over more GPUs than any machine has; empty where there are none."""
        largest = max((int(node.gpus) for node in nodes), default=0)
        for actors in self.actors:
            gpus = actors.gpus / actors.count
            if actors.spread and gpus > max(largest, 1):
                return (
                    f"{actors.spread}={gpus:g} takes {gpus:g} GPUs of one machine for each {actors.noun}, there is "
                    f"{f'none with more than {largest}' if largest else 'none with a GPU'}: {machines(nodes)}; set it "
                    f"to {max(largest, 1)}"
                )
        return ""

    def _too_much_cache(self, nodes: Sequence[Node]) -> str:
        """The refusal of KV caches that the machines' memory can't hold; empty where it can, and where there are GPUs,
        whose own memory holds them."""
        caches = [actors for actors in self.actors if actors.kv_cache_gib]
        cache_gib = sum(actors.count * actors.kv_cache_gib for actors in caches)
        memory_gib = sum(node.memory for node in nodes) / 2**30
        if any(node.gpus for node in nodes) or cache_gib <= memory_gib:
            return ""
        settings = ", ".join(f"{each.kv_cache_setting}={each.kv_cache_gib:g} for {_counted(each)}" for each in caches)
        return f"{settings}: {cache_gib:g} GiB of memory in all, {machines(nodes)} has {memory_gib:.1f}; lower it"

    def busy(self, nodes: Sequence[Node]) -> str:
        """Why the stage has to wait now; empty where what it asks is free."""
        free = sum(int(node.free_gpus) for node in nodes)
        if any(node.gpus for node in nodes) and free < self.gpus:
            return f"asks for {self.gpus:g} GPUs ({self}), {free} are free: {machines(nodes)}"
        if sum(node.free_cpus for node in nodes) < claims(self.actors, gpus=any(node.gpus for node in nodes)):
            return f"its processes find no free core: {machines(nodes)}"
        return ""

    def __str__(self) -> str:
        return ", ".join(map(_counted, self.actors)) or "no processes"


def demand(config: AnyStage, recipe: Recipe | None = None) -> Demand:
    """The processes that a stage of this configuration starts. Judging by rules costs little, and is not counted.

    recipe: what the stage is part of; the judges of the gate that it validates by are counted with it.
    """
    return Demand(list(_actors(config, recipe)))


def options(*, gpus: bool) -> dict[str, Any]:
    """What one rank or engine asks Ray for: half a GPU, since they share them in pairs. Without GPUs almost nothing:
    they take turns on all cores."""
    return {"num_cpus": 1, "num_gpus": 0.5} if gpus else {"num_cpus": 0.1}


def claims(actors: Sequence[Actors], *, gpus: bool) -> float:
    """CPUs that Ray sets aside for the actors; judges claim none."""
    return sum(some.count for some in actors if some.shares) * options(gpus=gpus)["num_cpus"]


def machines(nodes: Sequence[Node]) -> str:
    """The nodes in words."""
    return ", ".join(
        f"{node.name} ({node.gpus:g} GPUs, {node.free_gpus:g} free)"
        if node.gpus
        else f"{node.name} ({node.cpus:g} cores, {node.free_cpus:g} unclaimed)"
        for node in nodes
    )


def _counted(actors: Actors) -> str:
    return f"{actors.count} {actors.noun}{'s' * (actors.count > 1)}"


def _actors(config: AnyStage, recipe: Recipe | None) -> Iterator[Actors]:
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    if trainer is not None:
        ranks = trainer.num_ranks
        yield Actors("training rank", ranks, ranks, ranks * trainer.threads, "trainer.num_ranks")
    rollout: RolloutConfig | None = getattr(config, "rollout", None)
    if rollout is not None:
        engines, devices = rollout.num_engines, rollout.num_engines * rollout.tensor_parallel_size
        yield Actors(
            "engine",
            engines,
            devices,
            engines * rollout.threads,
            "rollout.num_engines",
            spread="rollout.tensor_parallel_size",
            kv_cache_gib=rollout.kv_cache_gib,
            kv_cache_setting="rollout.kv_cache_gib",
        )
    suites: AnyStage | None = config
    if not isinstance(config, EvalConfig | GateConfig):
        yield from _judges(_reward_specs(config), getattr(config, "reward_pool", None))
        suites = validation_gate(config, recipe) if recipe else None
    if isinstance(suites, EvalConfig | GateConfig):
        # Suites are run one after the other, each with judges of its own.
        by_suite = [list(_judges(_reward_specs(suite), suites.reward_pool)) for suite in suites.suites.values()]
        yield from max(by_suite, key=lambda judges: sum(some.gpus for some in judges), default=[])


def _judges(specs: Iterable[RewardSpec], pool: RewardPoolConfig | None) -> Iterator[Actors]:
    for spec in specs:
        if spec.name in MODEL_KINDS and pool is not None:
            workers = pool.workers.get(spec.label, 1)
            threads = workers * int(spec.args.get("threads", 1))
            gpus = workers * float(1.0 if spec.args.get("gpus") is None else spec.args["gpus"])
            yield Actors(
                f"'{spec.label}' judge",
                workers,
                gpus,
                threads,
                f"reward_pool.workers.{spec.label}",
                shares=False,
                spread="args.gpus",
                kv_cache_gib=float(spec.args.get("kv_cache_gib", 0.0)),
                kv_cache_setting="args.kv_cache_gib",
            )


def _reward_specs(config: Settings) -> list[RewardSpec]:
    return [node for _, node in walk(config) if isinstance(node, RewardSpec)]
