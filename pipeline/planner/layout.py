"""Layouts of a stage on a cluster: whether one fits, the seconds of its step, and the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from configs.train import OffloadConfig
from pipeline.models.experts import EXPERT_PARALLEL_FAMILIES
from pipeline.planner.cost import generate_seconds, sync_seconds, train_seconds
from pipeline.planner.devices import GIB, Cluster, Device
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
from pipeline.planner.stage import PlannedStage

USABLE = 0.92
"""Share of a device's memory to plan with; fragmentation takes the rest."""
MAX_EXPERT_PARALLEL = 64
MAX_TENSOR_PARALLEL = 32


@dataclass(frozen=True, slots=True)
class StageLayout:
    """A stage's ranks, and its engines where it has some, laid out on a cluster."""

    stage: PlannedStage
    train: TrainLayout
    rollout: RolloutLayout | None
    cluster: Cluster

    def __str__(self) -> str:
        return f"{self.train}; {self.rollout}" if self.rollout else str(self.train)

    def memory(self) -> dict[str, Parts]:
        """Return the bytes on the fullest device by phase: of a rank and an engine that share it, or of the larger."""
        if self.rollout is None:
            return self.rank_memory()
        rank, engine = self.rank_memory(), self.engine_memory()
        if self.stage.separate:
            return {phase: max(rank[phase], engine[phase], key=total) for phase in rank}
        return {phase: merged(rank[phase], engine[phase]) for phase in rank}

    def rank_memory(self) -> dict[str, Parts]:
        """Return the bytes of a rank on its device by phase. For a sync it holds its weights alone, and it sleeps while
        engines sample; on the CPU it keeps everything."""
        stage, device = self.stage, self.cluster.device
        state, _ = train_state(stage.model, self.train, reference=stage.reference)
        lean = device.is_cpu and stage.model.dtype == "float32"
        peak = step_working(stage.model, self.train, longest=stage.work.longest, lean=lean)
        runtime = {"runtime": float(device.runtime)}
        if self.rollout is None:
            return {"train": merged(state, peak, runtime)}
        weights = {name: size for name, size in state.items() if name == "weights"}
        return {
            "train": merged(state, peak, runtime),
            "sync": merged(state if device.is_cpu else weights, sync_working(stage.model, self.train), runtime),
            "generate": merged(state if device.is_cpu else {}, runtime),
        }

    def engine_memory(self) -> dict[str, Parts]:
        """Return the bytes of an engine on each of its devices by phase. It sleeps in training, and for a sync it holds
        its weights alone; on the CPU it keeps everything."""
        assert self.rollout is not None, "a stage with engines"
        runtime = {"runtime": float(self.cluster.device.runtime)}
        parts = {
            name if name == "KV cache" else f"engine's {name}": size
            for name, size in rollout_state(self.stage.model, self.rollout).items()
        }
        awake = merged(parts, runtime)
        if self.cluster.device.is_cpu:
            return dict.fromkeys(("train", "sync", "generate"), awake)
        weights = {name: size for name, size in parts.items() if name == "engine's weights"}
        return {"train": runtime, "sync": merged(weights, runtime), "generate": awake}

    def host(self) -> float:
        """Return the bytes in the machine's memory: offloaded parts, and the sleeping ranks. A sleeping engine leaves
        nothing there."""
        if self.cluster.device.is_cpu:
            return 0.0  # it is the device's own memory
        state, offloaded = train_state(self.stage.model, self.train, reference=self.stage.reference)
        return total(offloaded) + (total(state) if self.rollout is not None else 0.0)

    def obstacle(self) -> str:
        """Return why the placement does not fit, or ""."""
        device, judges = self.cluster.device, self.stage.judge_devices
        engines = self.rollout.engines * self.rollout.tensor_parallel if self.rollout else 0
        devices = sum((self.train.ranks, engines)) if self.stage.separate else max(self.train.ranks, engines)
        devices += judges
        if devices > self.cluster.count and not device.is_cpu:
            judging = f", and {judges} for judges" if judges else ""
            sharing = "have their own" if self.stage.separate else "share theirs"
            shared = f"{self.train.ranks} ranks and {engines} of engines {sharing}{judging}"
            return f"takes {devices} devices ({shared}) of {self.cluster}"
        usable = USABLE * device.memory
        for phase, parts in self.memory().items():
            if (needed := total(parts)) > usable:
                largest = sorted(parts, key=lambda name: -parts[name])[:3]
                details = ", ".join(f"{name} {parts[name] / GIB:.1f}" for name in largest)
                return f"{phase}: {needed / GIB:.1f} GiB of {usable / GIB:.1f} ({details})"
        if self.host() > USABLE * device.host_memory:
            return f"host: {self.host() / GIB:.0f} GiB a device of {USABLE * device.host_memory / GIB:.0f}"
        return ""

    def seconds(self) -> tuple[dict[str, float], float]:
        """Return (seconds of a step by phase, seconds of `generate` that the longest completions cost)."""
        model, work = self.stage.model, self.stage.work
        seconds = train_seconds(model, work, self.train, self.cluster)
        if self.rollout is None:
            return seconds, 0.0
        generated, tail = generate_seconds(model, work, self.rollout, self.cluster.device)
        return {"generate": generated} | seconds | {"sync": sync_seconds(model, self.train, self.cluster)}, tail


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory and time of a placement. There are no seconds where it does not fit."""

    placement: StageLayout
    memory: dict[str, Parts]
    """Bytes of a device by phase and component."""
    host: float
    """Bytes of the machine's memory that a device's share of the stage takes at most."""
    seconds: dict[str, float]
    """Seconds of a step by phase."""
    tail: float
    """Seconds of `generate` that the longest completions cost, compared with all having the mean length."""
    reason: str
    """Why it does not fit; empty where it does."""

    @classmethod
    def of(cls, placement: StageLayout) -> "Plan":
        """Compute the plan of a placement, whether it fits or not."""
        reason = placement.obstacle()
        seconds, tail = ({}, 0.0) if reason else placement.seconds()
        return cls(placement, placement.memory(), placement.host(), seconds, tail, reason)

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def fullest(self) -> float:
        """Bytes of the fullest phase, which orders the plans that don't fit."""
        return max(total(parts) for parts in self.memory.values())


def own_plan(stage: PlannedStage, cluster: Cluster) -> Plan:
    """Plan the layout that the stage's configuration sets."""
    train = TrainLayout.of(stage.trainer, stage.moments)
    rollout = RolloutLayout.of(stage.rollout) if stage.rollout else None
    if stage.rollout and rollout and stage.rollout.kv_cache_gib == "auto":
        rollout = replace(rollout, kv_cache=max(0.0, _left_for_cache(StageLayout(stage, train, rollout, cluster))))
    return Plan.of(StageLayout(stage, train, rollout, cluster))


def sweep(stage: PlannedStage, cluster: Cluster) -> list[Plan]:
    """Plan every layout tried: first those that fit, by seconds of a step; then the others, by memory."""
    plans = [
        Plan.of(StageLayout(stage, train, rollout, cluster))
        for train in train_layouts(stage, cluster)
        for rollout in rollout_layouts(stage, train, cluster)
    ]
    return sorted(plans, key=lambda plan: (bool(plan.reason), plan.fullest if plan.reason else plan.step))


def predicted_peak(stage: PlannedStage, device: Device, tokens: int) -> float | None:
    """Predict the bytes that a rank's step of micro-batches up to `tokens` long reaches, as `memory/peak_gib` does.

    None for a stage that the memory model does not cover. A GPU's peak is without its runtime and without the parts
    that are offloaded; a CPU's has both.
    """
    if not stage.predictable:
        return None
    layout = replace(TrainLayout.of(stage.trainer, stage.moments), micro_batch_tokens=tokens)
    state, offloaded = train_state(stage.model, layout, reference=stage.reference)
    lean = device.is_cpu and stage.model.dtype == "float32"
    working = step_working(stage.model, layout, longest=0, lean=lean)
    return total(state, working) + (total(offloaded) + device.runtime if device.is_cpu else 0)


def train_layouts(stage: PlannedStage, cluster: Cluster) -> Iterator[TrainLayout]:
    """Yield layouts of the ranks: the most ranks that divide an update evenly, in every way that DeepSpeed allows."""
    model, free = stage.model, _free_devices(stage, cluster)
    ranks = max(n for n in range(1, free + 1) if stage.batch_size % n == 0)
    expert_parallel = [1]
    if model.family in EXPERT_PARALLEL_FAMILIES and not model.adapters:
        sizes = _powers_of_two(min(ranks, MAX_EXPERT_PARALLEL))
        expert_parallel = [n for n in sizes if ranks % n == 0 and model.num_experts % n == 0]
    own = stage.trainer.micro_batch_tokens
    micro_batches = sorted({max(own // cut, min(own, stage.work.longest)) for cut in (1, 2, 4)}, reverse=True)
    for zero_stage in (0, 1) if ranks == 1 else (1, 2, 3):
        for spread in expert_parallel:
            for tokens in micro_batches:
                for checkpointing in (False, True):
                    for offload in _offloads(zero_stage, cluster.device):
                        yield TrainLayout(ranks, zero_stage, spread, tokens, checkpointing, offload, stage.moments)


def rollout_layouts(stage: PlannedStage, train: TrainLayout, cluster: Cluster) -> Iterator[RolloutLayout | None]:
    """Yield layouts of the engines beside the ranks: as many as there is room for.

    The KV cache takes the memory that is left, up to what all completions need at once.
    """
    if stage.rollout is None:
        yield None
        return
    device, free = cluster.device, _free_devices(stage, cluster)
    for size in _powers_of_two(1 if device.is_cpu else min(free, MAX_TENSOR_PARALLEL)):
        if stage.model.heads % size:
            continue
        empty = RolloutLayout(free // size, size, 0.0, stage.rollout.max_num_seqs, tuple(stage.rollout.fp8))
        token_bytes = kv_bytes(stage.model, empty)
        at_once = min(empty.max_seqs, -(-stage.work.sequences // empty.engines))
        unused = _left_for_cache(StageLayout(stage, train, empty, cluster))
        least = stage.rollout.max_model_len * token_bytes
        yield replace(empty, kv_cache=max(least, min(at_once * stage.work.longest * token_bytes, unused)))


def _left_for_cache(layout: StageLayout) -> float:
    """Bytes of a device that are left for a KV cache while engines sample."""
    return USABLE * layout.cluster.device.memory - total(layout.memory()["generate"])


def _free_devices(stage: PlannedStage, cluster: Cluster) -> int:
    return max(1, cluster.count - (0 if cluster.device.is_cpu else stage.judge_devices))


def _offloads(zero_stage: int, device: Device) -> list[OffloadConfig | None]:
    if zero_stage == 0 or device.is_cpu:
        return [None]
    return [None, OffloadConfig()] + ([OffloadConfig(parameters=True)] if zero_stage == 3 else [])


def _powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]
