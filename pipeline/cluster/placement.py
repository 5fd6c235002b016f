"""The devices of every rank, engine and judge of a stage: a pure function of the machines and the stage's actors.

Rank i has the i-th device. An engine has as many devices of one machine as it has shards. Colocated, ranks and engines
take turns on the same devices, half of each; separate, and where a device has one user, that one has it whole. Judges
have devices of their own, which several share if each takes a fraction.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil

from pipeline.cluster.actors import ActorGroup, ActorKind, Node, describe_nodes

_GIB = 2**30

DeviceKey = tuple[str, int]
"""A machine, and the number of a device among those that were free there."""

ActorBytes = Mapping[str, Mapping[str, float]]
"""Bytes that an actor holds on each of its devices by phase, for a kind, or a judge's label."""

_LESS_MEMORY: dict[ActorKind, str] = {
    "rank": "raise trainer.zero_stage, set trainer.offload, or lower trainer.micro_batch_tokens",
    "engine": "lower rollout.kv_cache_gib, or raise rollout.tensor_parallel_size",
    "judge": "lower args.kv_cache_gib, or raise args.gpus",
}


@dataclass(frozen=True, slots=True)
class PlacedActor:
    """One actor on its devices. share: its part of each of them. bytes: those that it holds on each, by phase."""

    kind: ActorKind
    index: int
    devices: tuple[DeviceKey, ...]
    share: float
    label: str = ""
    suite: str = ""
    bytes: Mapping[str, float] = field(default_factory=dict[str, float])

    def __str__(self) -> str:
        name = f"'{self.label}' judge" if self.kind == "judge" else self.kind
        return f"{name} {self.index}{f' in suite {self.suite}' if self.suite else ''}"


@dataclass(frozen=True, slots=True)
class StagePlacement:
    """All actors of a stage on their devices."""

    actors: list[PlacedActor]
    devices: list[DeviceKey]
    """Devices in the order of their machines."""

    def of(self, kind: ActorKind, label: str = "", suite: str = "") -> list[PlacedActor]:
        """Return the actors of a kind, of a judge by its label and suite, in their order."""
        wanted = (kind, label, suite)
        return [actor for actor in self.actors if (actor.kind, actor.label, actor.suite) == wanted]

    def bundles(self) -> list[DeviceKey]:
        """Return the devices of ranks and engines, in the order of their machines: rank i has the i-th."""
        used = {device for actor in self.actors if actor.kind != "judge" for device in actor.devices}
        return [device for device in self.devices if device in used]

    def users(self) -> dict[DeviceKey, list[PlacedActor]]:
        """Return the actors of every device that has any."""
        users: dict[DeviceKey, list[PlacedActor]] = {}
        for actor in self.actors:
            for device in actor.devices:
                users.setdefault(device, []).append(actor)
        return {device: users[device] for device in self.devices if device in users}


def place(
    groups: Sequence[ActorGroup], nodes: Sequence[Node], *, separate: bool, actor_bytes: ActorBytes | None = None
) -> StagePlacement:
    """Give every actor its devices among the free ones of `nodes`; without GPUs all take turns on the first node.

    separate: engines get other devices than ranks. actor_bytes: bytes of each kind by phase; a device that would hold
    more than its machine's `device_memory` is refused. Raises ValueError naming the setting to change.

    Example:
        place(stage_demand(config).actors, [Node("a", 64, 8, 64, 8)], separate=False).of("rank")[0].devices
    """
    if not any(node.gpus for node in nodes):
        devices = [(nodes[0].key, 0)]
        actors = [
            PlacedActor(group.kind, index, tuple(devices), 1.0, group.label, group.suite)
            for group, index in _all(groups)
        ]
    else:
        # The emptiest machines first, so that a stage spreads over few.
        ordered = sorted(nodes, key=lambda node: -int(node.free_gpus))
        devices = [(node.key, number) for node in ordered for number in range(int(node.free_gpus))]
        try:
            actors = _on_gpus(groups, devices, separate=separate)
        except LookupError as error:
            raise ValueError(f"{error}: {describe_nodes(nodes)}") from None
    placement = StagePlacement([_with_bytes(actor, actor_bytes or {}) for actor in actors], devices)
    _refuse_overfull(placement, {node.key: node for node in nodes})
    return placement


def spread(count: int, nodes: Sequence[Node]) -> list[Node]:
    """Return the node of each of `count` processes without GPUs: blocks in the order of the nodes, by their cores.

    Example:
        spread(3, [Node("a", 2, 0, 2, 0), Node("b", 1, 0, 1, 0)])  # a, a, b
    """
    ends = list(accumulate(node.cpus for node in nodes))
    return [nodes[min(bisect_right(ends, number / count * ends[-1]), len(nodes) - 1)] for number in range(count)]


def _all(groups: Sequence[ActorGroup]) -> Iterator[tuple[ActorGroup, int]]:
    return ((group, index) for group in groups for index in range(group.count))


def _on_gpus(groups: Sequence[ActorGroup], devices: list[DeviceKey], *, separate: bool) -> list[PlacedActor]:
    """Place the actors on `devices`. Raises LookupError for one that finds none."""
    ranks, engines, judges = (
        [(group, index) for group, index in _all(groups) if group.kind == kind] for kind in ("rank", "engine", "judge")
    )
    free = list(devices)
    if separate:
        rank_devices = [_take(free, *rank) for rank in ranks]
        engine_devices = [_take(free, *engine) for engine in engines]
    else:
        # The engines first, since each needs devices of one machine; ranks then share these.
        engine_devices = [_take(free, *engine) for engine in engines]
        shared = [device for block in engine_devices for device in block]
        spare = [_take(free, *rank)[0] for rank in ranks[len(shared) :]]
        chosen = sorted([*shared, *spare], key=devices.index)
        rank_devices = [(device,) for device in chosen[: len(ranks)]]
    twice = {device for block in rank_devices for device in block} & {d for block in engine_devices for d in block}
    actors = [
        PlacedActor(group.kind, index, block, 0.5 if twice & set(block) else 1.0)
        for (group, index), block in zip([*ranks, *engines], [*rank_devices, *engine_devices], strict=True)
    ]
    actors += _judges([judge for judge in judges if not judge[0].suite], free)
    for suite in dict.fromkeys(group.suite for group, _ in judges if group.suite):
        # Suites run one after the other, on the same devices.
        actors += _judges([judge for judge in judges if judge[0].suite == suite], list(free))
    return actors


def _judges(judges: list[tuple[ActorGroup, int]], free: list[DeviceKey]) -> list[PlacedActor]:
    """Place judges on `free`, which loses their devices; fractions of one device are filled up first."""
    actors: list[PlacedActor] = []
    left: dict[DeviceKey, float] = {}
    for group, index in judges:
        share = min(group.gpus, 1.0)
        block = next(((device,) for device, rest in left.items() if share < 1 and rest + 1e-9 >= share), None)
        block = block or _take(free, group, index)
        left |= {device: left.get(device, 1.0) - share for device in block}
        actors.append(PlacedActor(group.kind, index, block, share, group.label, group.suite))
    return actors


def _take(free: list[DeviceKey], group: ActorGroup, index: int) -> tuple[DeviceKey, ...]:
    """Remove from `free` the devices of one actor, all of one machine unless its group spans machines. Raises
    LookupError where there are too few."""
    size = ceil(group.gpus)
    for node in dict.fromkeys(name for name, _ in free):
        block = tuple(free[:size] if group.spans_nodes else [device for device in free if device[0] == node][:size])
        if len(block) == size:
            free[:] = [device for device in free if device not in block]
            return block
    if not size:
        return ()
    remedy = f"lower {group.setting}"
    if size > 1:
        span = ", or set rollout.span_nodes: true" if group.kind == "engine" else ""
        remedy += f" or {group.gpus_setting}{span}"
        size_text = f"{size} free GPUs" + ("" if group.spans_nodes else " on one machine")
    else:
        size_text = "free GPU"
    raise LookupError(f"{group.noun} {index} of {group.count} finds no {size_text}; {remedy}")


def _with_bytes(actor: PlacedActor, actor_bytes: ActorBytes) -> PlacedActor:
    return replace(actor, bytes=actor_bytes.get(actor.label or actor.kind, {}))


def _refuse_overfull(placement: StagePlacement, nodes: Mapping[str, Node]) -> None:
    for (key, number), actors in placement.users().items():
        usable = nodes[key].device_memory
        for phase in dict.fromkeys(phase for actor in actors for phase in actor.bytes):
            if (needed := held_bytes(actors, phase)) > usable:
                largest = max(actors, key=lambda actor: actor.bytes.get(phase, 0.0))
                parts = ", ".join(f"{actor} {actor.bytes.get(phase, 0.0) / _GIB:.1f}" for actor in actors)
                raise ValueError(
                    f"{phase}: device {number} of {nodes[key].name} would hold {needed / _GIB:.1f} GiB of "
                    f"{usable / _GIB:.1f} ({parts}); {_LESS_MEMORY[largest.kind]}"
                )


def held_bytes(actors: Sequence[PlacedActor], phase: str) -> float:
    """Return the bytes of a device's actors in a phase. Suites run one after the other, so the largest counts."""
    by_suite = dict.fromkeys((actor.suite for actor in actors), 0.0)
    for actor in actors:
        by_suite[actor.suite] += actor.bytes.get(phase, 0.0)
    return by_suite.pop("", 0.0) + max(by_suite.values(), default=0.0)
