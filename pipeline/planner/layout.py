"""Layouts of a stage on a cluster: whether one fits, what a step takes on it, and the quickest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from configs.train import OffloadConfig
from pipeline.models.experts import EXPERT_PARALLEL_FAMILIES
from pipeline.planner.asked import Asked
from pipeline.planner.cost import generate_seconds, sync_seconds, train_seconds
from pipeline.planner.devices import GIB, Cluster
from pipeline.planner.memory import (
    Parts,
    RolloutLayout,
    TrainLayout,
    kv_bytes,
    merged,
    rollout_state,
    step_working,
    sync_working,
    total,
    train_state,
)

USABLE = 0.92
"""Share of a device's memory that may be planned with; the rest is what fragments."""
MOST_SPREAD = 64
MOST_TENSOR_PARALLEL = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """A stage on a layout: bytes of a device by phase and component, seconds of a step by phase.

    There are no seconds where it doesn't fit.
    """

    train: TrainLayout
    rollout: RolloutLayout | None
    memory: dict[str, Parts]
    host: float
    """Bytes of the machine's memory that a device's share of the stage takes at most."""
    seconds: dict[str, float]
    tail: float
    """Seconds of `generate` that the longest completions cost, compared with all being of the mean length."""
    reason: str
    """Why it doesn't fit; empty where it does."""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def excess(self) -> float:
        """Bytes of the fullest phase, by which plans that don't fit are compared."""
        return max(total(parts) for parts in self.memory.values())

    def __str__(self) -> str:
        return f"{self.train}; {self.rollout}" if self.rollout else str(self.train)


def own_plan(asked: Asked, cluster: Cluster) -> Plan:
    """The plan of the layout that the configuration sets."""
    rollout = asked.rollout
    train = TrainLayout.of(asked.trainer, asked.moments)
    engines = None
    if rollout is not None:
        engines = RolloutLayout(
            rollout.num_engines,
            rollout.tensor_parallel_size,
            rollout.kv_cache_gib * GIB,
            rollout.max_num_seqs,
            tuple(rollout.fp8),
        )
    return plan_of(asked, train, engines, cluster)


def plan_of(asked: Asked, train: TrainLayout, rollout: RolloutLayout | None, cluster: Cluster) -> Plan:
    """The plan of one layout, whether it fits or not."""
    memory = phases(asked, train, rollout, cluster)
    host = _host(asked, train, rollout, cluster)
    reason = _reason(asked, train, rollout, memory, host, cluster)
    if reason:
        return Plan(train, rollout, memory, host, {}, 0.0, reason)
    seconds = train_seconds(asked.model, asked.work, train, cluster, asked.dtype)
    tail = 0.0
    if rollout is not None:
        generated, tail = generate_seconds(asked.model, asked.work, rollout, cluster.device, asked.dtype)
        synced = sync_seconds(asked.model, train, cluster, asked.dtype)
        seconds = {"generate": generated} | seconds | {"sync": synced}
    return Plan(train, rollout, memory, host, seconds, tail, reason)


def sweep(asked: Asked, cluster: Cluster) -> list[Plan]:
    """Every layout that is tried, those that fit first, the quickest first of these."""
    plans = [
        plan_of(asked, train, rollout, cluster)
        for train in train_layouts(asked, cluster)
        for rollout in rollout_layouts(asked, train, cluster)
    ]
    return sorted(plans, key=lambda plan: (bool(plan.reason), plan.excess if plan.reason else plan.step))


def phases(asked: Asked, train: TrainLayout, rollout: RolloutLayout | None, cluster: Cluster) -> dict[str, Parts]:
    """Bytes on the fullest device by phase. Whoever doesn't work sleeps, where it can: not on the CPU, and a rank not
    without ZeRO; a frozen reference stays. During a sync both are awake."""
    model, dtype, device = asked.model, asked.dtype, cluster.device
    lean = device.measured and dtype == "float32"
    state, _ = train_state(model, train, dtype, reference=asked.reference)
    peak = step_working(model, train, dtype, longest=asked.work.longest, lean=lean)
    runtime = {"runtime": float(device.runtime)}
    if rollout is None:
        return {"train": merged(state, peak, runtime)}
    engine = rollout_state(model, rollout, dtype)
    asleep = {name: size for name, size in state.items() if name == "reference"}
    both = {"runtime": 2.0 * device.runtime}
    engine_asleep: Parts = {}
    if device.measured:
        asleep, engine_asleep = state, _named(engine)
    elif train.zero_stage == 0:
        asleep = state
    return {
        "train": merged(state, peak, engine_asleep, both),
        "sync": merged(state, sync_working(model, train, dtype), _named(engine), both),
        "generate": merged(asleep, _named(engine), both),
    }


def train_layouts(asked: Asked, cluster: Cluster) -> Iterator[TrainLayout]:
    """Layouts of the ranks: as many as divide the work of an update evenly, spread in every way DeepSpeed allows."""
    free = cluster.count - (0 if cluster.device.measured else asked.judges)
    ranks = max((n for n in range(1, max(free, 1) + 1) if asked.divided % n == 0), default=1)
    model = asked.model
    spreads = [1]
    if model.family in EXPERT_PARALLEL_FAMILIES:
        spreads = [n for n in _powers(min(ranks, MOST_SPREAD)) if ranks % n == 0 and model.num_experts % n == 0]
    own = asked.trainer.micro_batch_tokens
    sizes = sorted({max(own // cut, min(own, asked.work.longest)) for cut in (1, 2, 4)}, reverse=True)
    for stage in (0, 1) if ranks == 1 else (1, 2, 3):
        for spread in spreads:
            for tokens in sizes:
                for checkpointing in (False, True):
                    for offload in _offloads(stage, cluster):
                        yield TrainLayout(ranks, stage, spread, tokens, checkpointing, offload, asked.moments)


def rollout_layouts(asked: Asked, train: TrainLayout, cluster: Cluster) -> Iterator[RolloutLayout | None]:
    """Layouts of the engines beside these ranks: as many as there is room for, with the KV cache that is left, up to
    what all completions need at once."""
    if asked.rollout is None:
        yield None
        return
    model, device, work = asked.model, cluster.device, asked.work
    free = max(1, cluster.count - (0 if device.measured else asked.judges))
    for size in _powers(1 if device.measured else min(free, MOST_TENSOR_PARALLEL)):
        if model.heads % size:
            continue
        engines = free // size
        empty = RolloutLayout(engines, size, 0.0, asked.rollout.max_num_seqs, tuple(asked.rollout.fp8))
        token = kv_bytes(model, empty, asked.dtype)
        at_once = min(asked.rollout.max_num_seqs, -(-work.sequences // engines))
        fullest = max(total(parts) for name, parts in phases(asked, train, empty, cluster).items() if name != "train")
        left = USABLE * device.memory - fullest
        least = asked.rollout.max_model_len * token
        yield replace(empty, kv_cache=max(least, min(at_once * work.longest * token, left)))


def _named(engine: Parts) -> Parts:
    return {f"engine's {name}" if name != "KV cache" else name: size for name, size in engine.items()}


def _host(asked: Asked, train: TrainLayout, rollout: RolloutLayout | None, cluster: Cluster) -> float:
    """Bytes in the machine's memory: what is offloaded, and who sleeps."""
    if cluster.device.measured:
        return 0.0  # it is the device's own
    state, offloaded = train_state(asked.model, train, asked.dtype, reference=False)
    if rollout is None:
        return total(offloaded)
    engine = rollout_state(asked.model, replace(rollout, kv_cache=0.0), asked.dtype)
    return total(offloaded) + max(total(state) if train.zero_stage else 0.0, total(engine))


def _reason(
    asked: Asked,
    train: TrainLayout,
    rollout: RolloutLayout | None,
    memory: dict[str, Parts],
    host: float,
    cluster: Cluster,
) -> str:
    device = cluster.device
    engines = rollout.engines * rollout.tensor_parallel if rollout else 0
    devices = max(train.ranks, engines) + asked.judges
    if devices > cluster.count and not device.measured:
        judging = f", and {asked.judges} for judges" if asked.judges else ""
        return (
            f"takes {devices} devices ({train.ranks} ranks and {engines} of engines share theirs{judging}) of {cluster}"
        )
    usable = USABLE * device.memory
    for phase, parts in memory.items():
        if (asks := total(parts)) > usable:
            largest = sorted(parts, key=lambda name: -parts[name])[:3]
            told = ", ".join(f"{name} {parts[name] / GIB:.1f}" for name in largest)
            return f"{phase}: {asks / GIB:.1f} GiB of {usable / GIB:.1f} ({told})"
    if host > USABLE * device.host_memory:
        return f"host: {host / GIB:.0f} GiB a device of {USABLE * device.host_memory / GIB:.0f}"
    return ""


def _offloads(stage: int, cluster: Cluster) -> list[OffloadConfig | None]:
    if stage == 0 or cluster.device.measured:
        return [None]
    return [None, OffloadConfig()] + [OffloadConfig(parameters=True)] * (stage == 3)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]
