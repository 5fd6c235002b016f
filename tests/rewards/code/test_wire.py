"""What crosses between a solution and its tests: every plain value exactly, aliases and cycles, and nothing hostile."""

import enum
import math
import random
from collections import Counter, OrderedDict, namedtuple
from typing import Any, NoReturn

import pytest

from rewards.code.boxed.wire import MAX_BYTES, MAX_DEPTH, Malformed, Reader, TooMuch, Writer


def refuse(*what: Any) -> NoReturn:
    raise LookupError(f"no plain data: {what}")


def written(*values: Any) -> bytes:
    writer = Writer(refuse, [])
    for value in values:
        writer.put(value)
    return bytes(writer.data)


def crossed(value: Any) -> Any:
    return Reader(written(value), refuse, []).get()


PLAIN = [
    None, True, False, 0, -1, 10**5000, -(2**64), 0.0, -0.0, 1.5, math.inf, 5e-324, 2 - 3j, "", "a\x00\ud800\U0001f600",
    b"", b"\x00;\xff", (), (1, (2,)), [], [[], [None]], {}, {"a": [1], (1, 2): {3}, None: ()}, set(), {1, "a", (2,)},
    frozenset({1}), {frozenset({frozenset()})}, range(3), range(10, -4, -3), int, type(None), list, [object, str],
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:30] if value != 10**5000 else "10**5000")
def test_plain_values_arrive_as_they_are(value: Any) -> None:
    arrived = crossed(value)
    assert arrived == value and type(arrived) is type(value)
    assert str(arrived)[:9] == str(value)[:9] if value != 10**5000 else True  # -0.0 == 0.0, True == 1


def test_nan_arrives() -> None:
    assert math.isnan(crossed([math.nan])[0])


class Agreeable(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Color(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Agreeable("a"), "a"),
        ([Agreeable("a")], ["a"]),
        (Color.RED, 3),
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (namedtuple("Point", "x y")(1, 2), (1, 2)),
        (bytearray(b"ab"), b"ab"),
    ],
)
def test_subclasses_arrive_as_what_they_derive_from(value: Any, plain: Any) -> None:
    arrived = crossed(value)
    assert type(arrived) is type(plain)
    assert plain == arrived and repr(plain) == repr(arrived)


def test_aliases_and_cycles_survive() -> None:
    row: list[Any] = [0]
    loop: list[Any] = [1]
    loop.append(loop)
    arrived = crossed([row, row, {"again": row}, loop])
    arrived[0].append(5)
    assert arrived[1] is arrived[0] is arrived[2]["again"]
    assert arrived[3][1] is arrived[3]


def test_changes_in_place_come_home() -> None:
    inner: list[Any] = [1]
    data: dict[str, Any] = {"inner": inner, "gone": 0}
    group = {1, 2}
    ours: list[Any] = []
    writer = Writer(refuse, ours)
    writer.put((data, group))
    theirs: list[Any] = []
    far_data, far_group = Reader(bytes(writer.data), refuse, theirs).get()
    far_data["inner"].append([far_data])
    del far_data["gone"]
    far_group.clear()
    answer = Writer(refuse, theirs)
    answer.put_contents()
    answer.put(far_data["inner"])
    reader = Reader(bytes(answer.data), refuse, ours)
    reader.refill()
    assert reader.get() is inner
    assert data == {"inner": inner} and inner[0] == 1 and inner[1][0] is data and group == set()


def test_what_is_too_much_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(TooMuch):
        written(deep)
    with pytest.raises(TooMuch):
        written(["a" * 1000] * (MAX_BYTES // 1000) + [1])
    bush: Any = 0
    for _ in range(60):
        bush = (bush, bush)  # 2^60 leaves
    with pytest.raises(TooMuch):
        written(bush)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"i", b"i12", b"ix;", b"s5;ab", b"s-1;", b"f1234", b"l2;N", b"l-1;" + b"l1;" * 3, b"d1;N",
        b"d2;l0;N", b"S1;l0;", b"#0;", b"#9;", b"y3;foo", b"y8;__import", b"q", b"h0;", b"c5;", b"r3;i1;i1;i0;",
        b"r1;s1;a", b"lffffffffff;", b"s1;\xff", b"l1;" * (MAX_DEPTH + 2) + b"N", b"t1;" * 100_000, b"i" + b"f" * 100,
    ],
)  # fmt: skip
def test_forged_data_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        Reader(data, refuse, []).get()


def test_noise_is_malformed_or_plain() -> None:
    noise = random.Random(0)
    valid = written([{"a": (1, 2.5)}, "text", {3}, None])
    for _ in range(5000):
        data = bytearray(valid)
        for _ in range(noise.randint(1, 4)):
            data[noise.randrange(len(data))] = noise.choice(b"NTFifsbltdSzjry#hc;0123456789abcdef-")
        try:
            Reader(bytes(data), refuse, []).get()
        except Malformed:
            continue


def test_contents_of_the_wrong_kind_do_not_fit() -> None:
    for container, data in (([], b"d0;"), ({}, b"l0;"), (set(), b"l0;"), ([], b"N"), ([], b"")):
        with pytest.raises(Malformed):
            Reader(data, refuse, [container]).refill()
