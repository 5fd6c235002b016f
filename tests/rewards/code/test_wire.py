"""Values between a solution and its tests: plain ones, aliases and cycles cross exactly, and nothing hostile does."""

import enum
import math
import random
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from rewards.code.boxed.wire import MAX_BYTES, MAX_DEPTH, Malformed, Reader, TooMuch, Writer


def refuse(*what: Any) -> NoReturn:
    raise LookupError(f"no plain data: {what}")


def encoded(*values: Any) -> bytes:
    writer = Writer(refuse, [])
    for value in values:
        writer.put(value)
    return bytes(writer.data)


def crossed(value: Any) -> Any:
    return Reader(encoded(value), refuse, []).get()


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
        (type("Tally", (Counter,), {})("aab"), Counter("aab")),
        (type("Day", (date,), {})(2024, 2, 29), date(2024, 2, 29)),
        (type("Pair", (tuple,), {})((1, 2)), (1, 2)),
        (namedtuple("Odd", "count y")(1, 2), (1, 2)),  # its field would hide a method
        (bytearray(b"ab"), b"ab"),
    ],
)
def test_subclasses_arrive_as_what_they_derive_from(value: Any, plain: Any) -> None:
    arrived = crossed(value)
    assert type(arrived) is type(plain)
    assert plain == arrived and repr(plain) == repr(arrived)


Point = namedtuple("Point", "x y")
DEFAULTS: defaultdict[str, list[int]] = defaultdict(list, a=[1])
CARRIED = [
    Decimal("1.10"), Decimal("-0"), Decimal("1e-30"), Fraction(-2, 6), date(2024, 2, 29), time(23, 59, 1, 5),
    datetime(2024, 2, 29, 12, 30), datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=-5))),
    timedelta(days=-1, microseconds=3), timezone(timedelta(hours=2)), UTC, UUID(int=7), array("d", [1.5, 2]),
    deque([1, 2]), deque(maxlen=3), deque([(1,), [2]], maxlen=2), Counter("aab"), Counter(a=0), OrderedDict(b=1, a=2),
    DEFAULTS, defaultdict(None, {1: 2}), Point(1, "b"), [Point(Decimal(1), {Fraction(1, 2)})],
    {date(2024, 1, 1): deque([Decimal("2.50")])}, frozenset({Decimal(1), Point(1, 2)}),
    {"nested": [{"x": (Fraction(1),)}]},
]  # fmt: skip


@pytest.mark.parametrize("value", CARRIED, ids=repr)
def test_values_of_the_standard_library_arrive_as_they_are(value: Any) -> None:
    arrived = crossed(value)
    assert arrived == value and repr(arrived) == repr(value)
    if not hasattr(value, "_fields"):
        assert type(arrived) is type(value)


def test_decimals_keep_their_digits_and_orders_count() -> None:
    assert str(crossed(Decimal("1.10"))) == "1.10" and crossed(Decimal("NaN")).is_nan()
    assert crossed(OrderedDict(a=1, b=2)) != OrderedDict(b=2, a=1)
    assert crossed(deque([1])) != [1] and crossed(Counter(a=0)) == Counter()
    assert crossed(DEFAULTS)["new"] == [] and "new" not in DEFAULTS


def test_a_time_with_a_named_zone_arrives_at_the_same_moment() -> None:
    moment = datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Paris"))
    assert crossed(moment) == moment


class Node:
    size = 0

    def __init__(self, value: Any, following: Any = None) -> None:
        self.value, self.next = value, following

    def total(self) -> int:
        return self.value + (self.next.total() if self.next else 0)


@dataclass(frozen=True, slots=True)
class Place:
    x: int
    y: int


class Shade(enum.Enum):
    RED = 1


CLASSES: dict[str, type] = {"Node": Node, "Place": Place, "Shade": Shade, "Point": Point}


def shared(value: Any, *, strict: bool = True) -> Any:
    writer = Writer(refuse, [], CLASSES)
    writer.put(value)
    return Reader(bytes(writer.data), refuse, [], CLASSES, strict=strict).get()


def test_objects_of_shared_classes_arrive_as_their_attributes() -> None:
    head = shared(Node(1, Node(2)))
    assert type(head) is Node and head.total() == 3
    assert shared({Place(1, 2), Place(3, 4)}) == {Place(3, 4), Place(1, 2)}
    assert shared([Shade.RED])[0] is Shade.RED and type(shared(Point(1, 2))) is Point
    head.next.next = head
    pair = shared([head, head.next])
    assert pair[0].next is pair[1] and pair[1].next is pair[0]


def test_a_long_chain_of_objects_is_not_too_deep() -> None:
    head = None
    for number in range(5000):
        head = Node(number, head)
    arrived, count = shared(head), 0
    while arrived:
        arrived, count = arrived.next, count + 1
    assert count == 5000


def test_objects_changed_in_place_come_home() -> None:
    near: list[Any] = []
    head = Node(1, Node(2))
    writer = Writer(refuse, near, CLASSES)
    writer.put((head,))
    far: list[Any] = []
    (far_head,) = Reader(bytes(writer.data), refuse, far, CLASSES).get()
    far_head.next.next, far_head.next = far_head, None
    answer = Writer(refuse, far, CLASSES)
    answer.put_contents()
    second = head.next
    Reader(bytes(answer.data), refuse, near, CLASSES).refill()
    assert head.next is None and second.next is head


def hidden(**attributes: Any) -> Node:
    node = Node(1)
    vars(node).update(attributes)
    return node


@pytest.mark.parametrize("node", [hidden(total=5), hidden(value=str), hidden(__eq__=1), hidden(total=bool)])
def test_an_attribute_never_answers_for_a_method(node: Node) -> None:
    with pytest.raises(Malformed, match=r"replaced|no attribute"):
        shared(node)
    assert shared(node, strict=False) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"x9;os.systemt1;s2;id", b"x8;builtins", b"x10;decimal.Xt0;", b"x12;datetime.datet1;i1;", b"n4;Nodet1;i1;",
        b"e4;Nodes1;x", b"p5;Otheri0;", b"p4;Nodeb1;x", b"q;i", b"Dos.system;0;", b"x12;fractions.Fractiont2;i1;i0;",
        b"x11;decimal.Decimalt1;s1;x", b"m1;xt1;s4;a;b;t1;i1;", b"m3;a-bt1;s1;at1;i1;", b"a0;",
    ],
)  # fmt: skip
def test_nothing_else_can_be_made(data: bytes) -> None:
    with pytest.raises((Malformed, LookupError)):
        Reader(data, refuse, [], CLASSES).get()


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
    near: list[Any] = []
    writer = Writer(refuse, near)
    writer.put((data, group))
    far: list[Any] = []
    far_data, far_group = Reader(bytes(writer.data), refuse, far).get()
    far_data["inner"].append([far_data])
    del far_data["gone"]
    far_group.clear()
    answer = Writer(refuse, far)
    answer.put_contents()
    answer.put(far_data["inner"])
    reader = Reader(bytes(answer.data), refuse, near)
    reader.refill()
    assert reader.get() is inner
    assert data == {"inner": inner} and inner[0] == 1 and inner[1][0] is data and group == set()


def test_what_is_too_much_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(TooMuch):
        encoded(deep)
    with pytest.raises(TooMuch):
        encoded(["a" * 1000] * (MAX_BYTES // 1000) + [1])
    bush: Any = 0
    for _ in range(60):
        bush = (bush, bush)  # 2^60 leaves
    with pytest.raises(TooMuch):
        encoded(bush)


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
    valid = encoded([{"a": (1, 2.5)}, "text", {3}, None])
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
