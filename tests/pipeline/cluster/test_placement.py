"""Devices of each actor, worked out by hand, and every reason to refuse, with the setting that ends it."""

from collections.abc import Sequence

import pytest

from pipeline.cluster.actors import ActorGroup, ActorKind, Node
from pipeline.cluster.placement import ActorBytes, DeviceKey, StagePlacement, place, spread

GIB = 2**30


def machines(*gpus: float, free: Sequence[float] | None = None, **settings: float) -> list[Node]:
    return [
        Node(f"m{i}", 64, count, 64, left, **settings)
        for i, (count, left) in enumerate(zip(gpus, free or gpus, strict=True))
    ]


def ranks(count: int) -> ActorGroup:
    return ActorGroup("rank", count, 1, 0, "trainer.num_ranks")


def engines(count: int, size: int = 1, *, spans: bool = False) -> ActorGroup:
    return ActorGroup("engine", count, size, 0, "rollout.num_engines", "rollout.tensor_parallel_size", spans)


def judges(label: str, count: int, gpus: float, suite: str = "") -> ActorGroup:
    return ActorGroup("judge", count, gpus, 0, f"reward_pool.workers.{label}", "args.gpus", label=label, suite=suite)


def placed(
    groups: list[ActorGroup], nodes: list[Node], *, separate: bool = False, actor_bytes: ActorBytes | None = None
) -> StagePlacement:
    return place(groups, nodes, separate=separate, actor_bytes=actor_bytes)


def devices(placement: StagePlacement, kind: ActorKind, label: str = "", suite: str = "") -> list[list[DeviceKey]]:
    return [list(actor.devices) for actor in placement.of(kind, label, suite)]


def test_rank_and_engine_share_a_device_half_each() -> None:
    placement = placed([ranks(8), engines(8)], machines(8))
    assert devices(placement, "rank") == devices(placement, "engine") == [[("m0", i)] for i in range(8)]
    assert {actor.share for actor in placement.actors} == {0.5}


def test_engines_of_several_devices_cover_the_ranks() -> None:
    placement = placed([ranks(8), engines(4, 2)], machines(8))
    assert devices(placement, "engine") == [[("m0", 2 * i), ("m0", 2 * i + 1)] for i in range(4)]
    assert placement.bundles() == [("m0", i) for i in range(8)]


def test_ranks_alone_have_whole_devices() -> None:
    placement = placed([ranks(4)], machines(8))
    assert {actor.share for actor in placement.actors} == {1.0} and len(placement.bundles()) == 4
    more_ranks = placed([ranks(4), engines(2)], machines(8))
    assert [actor.share for actor in more_ranks.of("rank")] == [0.5, 0.5, 1.0, 1.0]


def test_separate_engines_have_devices_of_their_own() -> None:
    placement = placed([ranks(4), engines(2, 2)], machines(8), separate=True)
    assert devices(placement, "rank") == [[("m0", i)] for i in range(4)]
    assert devices(placement, "engine") == [[("m0", 4), ("m0", 5)], [("m0", 6), ("m0", 7)]]
    assert {actor.share for actor in placement.actors} == {1.0}


def test_ranks_are_in_the_order_of_machines_and_an_engine_keeps_to_one() -> None:
    placement = placed([ranks(12), engines(4, 3)], machines(8, 8))
    # Two engines of three devices leave two of each machine unused; ranks sit where the engines do.
    assert devices(placement, "engine") == [
        [(f"m{m}", first + i) for i in range(3)] for m in (0, 1) for first in (0, 3)
    ]
    assert [device for [device] in devices(placement, "rank")] == placement.bundles()
    assert placement.bundles() == [(f"m{m}", i) for m in (0, 1) for i in range(6)]


def test_an_engine_spans_machines_only_when_asked() -> None:
    with pytest.raises(ValueError, match=r"engine 0 of 1 finds no 16 free GPUs on one machine.*rollout.span_nodes"):
        placed([ranks(16), engines(1, 16)], machines(8, 8))
    placement = placed([ranks(16), engines(1, 16, spans=True)], machines(8, 8))
    assert devices(placement, "engine") == [[(f"m{m}", i) for m in (0, 1) for i in range(8)]]


def test_the_emptiest_machine_comes_first() -> None:
    placement = placed([ranks(4), engines(1, 4)], machines(8, 8, free=(3, 6)))
    assert placement.bundles() == [("m1", i) for i in range(4)]


def test_judges_have_their_own_devices_or_share_by_fraction() -> None:
    groups = [ranks(2), engines(2), judges("fair", 1, 2), judges("helpful", 2, 0.5), judges("kind", 1, 0.5)]
    placement = placed(groups, machines(8))
    assert devices(placement, "judge", "fair") == [[("m0", 2), ("m0", 3)]]
    assert devices(placement, "judge", "helpful") == [[("m0", 4)], [("m0", 4)]]
    assert devices(placement, "judge", "kind") == [[("m0", 5)]]


def test_the_judges_of_suites_take_the_same_devices_in_turn() -> None:
    groups = [engines(2), judges("own", 1, 1), judges("a", 2, 1, suite="first"), judges("a", 1, 1, suite="second")]
    placement = placed(groups, machines(8))
    assert devices(placement, "judge", "own") == [[("m0", 2)]]
    assert devices(placement, "judge", "a", "first") == [[("m0", 3)], [("m0", 4)]]
    assert devices(placement, "judge", "a", "second") == [[("m0", 3)]]


def test_a_judge_on_the_cpu_takes_no_device() -> None:
    assert devices(placed([engines(1), judges("small", 1, 0)], machines(1)), "judge", "small") == [[]]


def test_without_gpus_all_take_turns_on_the_first_machine() -> None:
    placement = placed([ranks(2), engines(1)], machines(0))
    assert devices(placement, "rank") == [[("m0", 0)], [("m0", 0)]] and devices(placement, "engine") == [[("m0", 0)]]


@pytest.mark.parametrize(
    ("groups", "nodes", "message"),
    [
        ([ranks(9)], machines(8), "training rank 8 of 9 finds no free GPU; lower trainer.num_ranks: m0"),
        (
            [engines(3, 3)],
            machines(8),
            "engine 2 of 3 finds no 3 free GPUs on one machine; lower rollout.num_engines or",
        ),
        ([engines(3, 2)], machines(3, 3), "engine 2 of 3 finds no 2 free GPUs on one machine"),
        (
            [ranks(8), judges("fair", 1, 1)],
            machines(8),
            "'fair' judge 0 of 1 finds no free GPU; lower reward_pool.workers",
        ),
    ],
)
def test_what_finds_no_device_names_the_setting(groups: list[ActorGroup], nodes: list[Node], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placed(groups, nodes)


def test_a_device_holds_its_actors_in_every_phase() -> None:
    sizes = {"rank": {"train": 60.0 * GIB, "sync": 20.0 * GIB}, "engine": {"train": 2.0 * GIB, "sync": 50.0 * GIB}}
    placement = placed([ranks(1), engines(1)], machines(1, device_memory=72 * GIB), actor_bytes=sizes)
    assert [actor.bytes for actor in placement.actors] == [sizes["rank"], sizes["engine"]]
    with pytest.raises(ValueError, match=r"sync: device 0 of m0 would hold 70.0 GiB of 65.0 .*lower rollout.kv_cache"):
        placed([ranks(1), engines(1)], machines(1, device_memory=65 * GIB), actor_bytes=sizes)
    apart = placed([ranks(1), engines(1)], machines(2, device_memory=65 * GIB), separate=True, actor_bytes=sizes)
    assert len(apart.bundles()) == 2


@pytest.mark.parametrize(
    "count, cores, expected",
    [
        (1, [2, 2], "0"),
        (2, [1, 1], "01"),
        (3, [2, 1], "001"),
        (4, [1, 1, 2], "0122"),
        (2, [0, 4], "11"),
        (2, [0, 0], "11"),
    ],
)
def test_without_gpus_processes_spread_by_cores(count: int, cores: list[float], expected: str) -> None:
    nodes = [Node(str(number), cpus, 0, cpus, 0) for number, cpus in enumerate(cores)]
    assert "".join(node.name for node in spread(count, nodes)) == expected
