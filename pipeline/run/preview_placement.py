"""The placement of a recipe's stages on a cluster that need not exist, with the bytes that the planner predicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from configs.references import PREFIX
from configs.sampling import RolloutConfig
from configs.stages import AnyStage, Recipe
from pipeline.cluster.actors import ActorGroup, Node
from pipeline.cluster.demand import stage_demand
from pipeline.cluster.placement import ActorBytes, StagePlacement
from pipeline.planner.architecture import Architecture, architecture_of, as_reward_model
from pipeline.planner.devices import GIB, Cluster
from pipeline.planner.layout import USABLE, own_plan
from pipeline.planner.memory import RolloutLayout, kv_bytes, rollout_state, total
from pipeline.planner.stage import PLANNED, dtype_of, origin_of, planned_stage


@dataclass(frozen=True, slots=True)
class PlacementPreview:
    """The placement of one stage, or the reason to refuse it. note: why bytes are missing."""

    placement: StagePlacement | None
    refused: str = ""
    note: str = ""


def preview_placement(config: AnyStage, recipe: Recipe, cluster: Cluster) -> PlacementPreview:
    """Place a stage as a run on an idle `cluster` does, by the same function (Demand.place), with the bytes of every
    actor on each of its devices by phase.

    Example:
        preview_placement(recipe.stages["grpo"], recipe, cluster_of("1x8xH100")).placement
    """
    demand, machines, note = stage_demand(config, recipe), machines_of(cluster), ""
    judges = [group for group in demand.actors if group.kind == "judge"]
    reasons = [demand.why_impossible(machines)]
    try:
        actor_bytes = predicted_bytes(config, recipe, cluster)
        reasons += _short_caches(config, recipe, judges)
    except ValueError as error:
        actor_bytes, note = {}, f"bytes unknown: {str(error).partition(';')[0]}"
    if reason := next(filter(None, reasons), ""):
        return PlacementPreview(None, reason, note)
    try:
        return PlacementPreview(demand.place(machines, actor_bytes), "", note)
    except ValueError as error:
        return PlacementPreview(None, str(error), note)


def machines_of(cluster: Cluster) -> list[Node]:
    """Return the idle machines of a cluster, `node0` the first."""
    device = cluster.device
    size = min(device.per_machine, cluster.count)
    return [
        Node(
            f"node{first // size}",
            inf,
            gpus := 0.0 if device.is_cpu else float(min(size, cluster.count - first)),
            inf,
            gpus,
            memory=device.host_memory * size,
            device_memory=USABLE * device.memory,
        )
        for first in range(0, cluster.count, size)
    ]


def predicted_bytes(config: AnyStage, recipe: Recipe, cluster: Cluster) -> ActorBytes:
    """Predict the bytes of a rank, an engine and each judge on each of its devices by phase.

    Raises ValueError for a model whose architecture is not known here, and a stage that the machines' own memory can't
    hold.
    """
    sizes: dict[str, dict[str, float]] = {}
    if isinstance(config, PLANNED):
        layout = own_plan(planned_stage(config, recipe, mean_share=0.5), cluster).placement
        sizes["rank"] = {phase: total(parts) for phase, parts in layout.rank_memory().items()}
        if layout.rollout:
            sizes["engine"] = {phase: total(parts) for phase, parts in layout.engine_memory().items()}
    elif (rollout := getattr(config, "rollout", None)) is not None:
        architecture = architecture_of(origin_of(config, recipe), dtype_of(config, recipe))
        sizes["engine"] = {"generate": _engine_bytes(architecture, rollout, cluster)}
    phases = list(sizes.get("rank", sizes.get("engine", {})))
    for group in stage_demand(config, recipe).actors:
        if group.kind == "judge":
            judge = total(rollout_state(*_judge_engine(group, recipe))) + cluster.device.runtime
            sizes[group.label] = dict.fromkeys(phases, judge)
    return sizes


def _engine_bytes(architecture: Architecture, rollout: RolloutConfig, cluster: Cluster) -> float:
    """Bytes of an engine on each device that it has alone."""
    layout = RolloutLayout.of(rollout)
    size = total(rollout_state(architecture, layout)) + cluster.device.runtime
    return max(size, USABLE * cluster.device.memory) if rollout.kv_cache_gib == "auto" else size


def _judge_engine(group: ActorGroup, recipe: Recipe) -> tuple[Architecture, RolloutLayout]:
    """The model of a judge, and its engine; a judge without an engine has no KV cache."""
    stage = recipe.stages.get(group.checkpoint.removeprefix(PREFIX))
    origin, dtype = (group.checkpoint, group.dtype) if stage is None else (origin_of(stage, recipe), group.dtype)
    if stage is not None and dtype == "auto":
        dtype = dtype_of(stage, recipe)
    architecture = architecture_of(origin, dtype)
    if stage is not None and stage.type == "rm":
        architecture = as_reward_model(architecture)
    assert group.kv_cache_gib != "auto", "a judge's cache has a size"
    devices = max(int(group.gpus), 1)
    return architecture, RolloutLayout(group.count, devices, group.kv_cache_gib * GIB, 1, group.fp8)


def _short_caches(config: AnyStage, recipe: Recipe, judges: list[ActorGroup]) -> Iterator[str]:
    """Why engines can't start: a KV cache is smaller than the longest input."""
    rollout = getattr(config, "rollout", None)
    if rollout is not None:
        architecture = architecture_of(origin_of(config, recipe), dtype_of(config, recipe))
        setting, longest = f"rollout.kv_cache_gib={rollout.kv_cache_gib}", rollout.max_model_len
        yield _short_cache(architecture, RolloutLayout.of(rollout), longest, setting, "rollout.max_model_len")
    for group in judges:
        architecture, layout = _judge_engine(group, recipe)
        setting = f"args.kv_cache_gib={group.kv_cache_gib} of a {group.noun}"
        yield _short_cache(architecture, layout, group.max_length or architecture.positions, setting, "args.max_length")


def _short_cache(architecture: Architecture, layout: RolloutLayout, longest: int, setting: str, length: str) -> str:
    """Empty if the cache is large enough, or its size is not known yet."""
    tokens = layout.kv_cache / kv_bytes(architecture, layout)
    if not 0 < tokens < longest:
        return ""
    return f"{setting} holds {tokens:,.0f} tokens, and its longest input has {longest:,}: raise it, or lower {length}"
