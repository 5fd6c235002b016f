"""Buckets: packed tensors come out unchanged, and damaged ones are named."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from rollout.types import SyncError
from rollout.weights import Bucket, open_buckets, to_buckets

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
    "strided": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def sent() -> Bucket:
    [bucket] = to_buckets(((name, tensor.clone()) for name, tensor in TENSORS.items()), 1)
    return bucket


def test_what_is_packed_comes_out() -> None:
    bucket = sent()
    assert all(payload.dtype == np.uint8 and payload.ndim == 1 for payload in bucket.payloads)
    records, tensors = open_buckets([bucket], SHAPES)
    assert records == bucket.records
    assert [record.dtype for record in records] == ["float32", "bfloat16", "float32", "float32"]
    for name, tensor in tensors:
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_nothing_is_copied_on_the_way() -> None:
    weight = torch.ones(4)
    [bucket] = to_buckets([("weight", weight)], 1)
    _, [(_, arrived)] = open_buckets([bucket], {"weight": (4,)})
    assert arrived.data_ptr() == weight.data_ptr()


def test_read_only_memory_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    bucket = sent()
    for payload in bucket.payloads:
        payload.flags.writeable = False
    open_buckets([bucket], SHAPES)
    assert not recwarn.list


def test_buckets_hold_about_their_size_and_at_least_one_tensor() -> None:
    mib = torch.zeros(2**18)
    tensors = [("a", mib), ("b", mib), ("c", mib), ("big", torch.zeros(3 * 2**18)), ("d", mib)]
    names = [[record.name for record in bucket.records] for bucket in to_buckets(tensors, 2)]
    assert names == [["a", "b"], ["c"], ["big"], ["d"]]


def _flip_a_bit(bucket: Bucket) -> None:
    bucket.payloads[0][3] ^= 1


def _cut_short(bucket: Bucket) -> None:
    bucket.payloads[0] = bucket.payloads[0][:8]


def _swap_payloads(bucket: Bucket) -> None:
    bucket.payloads[0], bucket.payloads[3] = bucket.payloads[3], bucket.payloads[0]


def _say_half(bucket: Bucket) -> None:
    bucket.records[0] = replace(bucket.records[0], dtype="float16")


def _say_nonsense(bucket: Bucket) -> None:
    bucket.records[0] = replace(bucket.records[0], dtype="Tensor")


def _turn(bucket: Bucket) -> None:
    bucket.records[0] = replace(bucket.records[0], shape=(3, 2))


def _rename(bucket: Bucket) -> None:
    bucket.records[0] = replace(bucket.records[0], name="matrix_2")


def _send_twice(bucket: Bucket) -> None:
    bucket.records.append(bucket.records[0])
    bucket.payloads.append(bucket.payloads[0])


def _leave_out(bucket: Bucket) -> None:
    del bucket.records[0], bucket.payloads[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_bit, "'matrix': checksum"),
        (_cut_short, "'matrix': checksum"),
        (_swap_payloads, "'matrix': checksum"),
        (_say_half, "'matrix': 24 bytes"),
        (_say_nonsense, "'matrix': .* 'Tensor'"),
        (_turn, r"'matrix' .*\(3, 2\).*\(2, 3\)"),
        (_rename, "'matrix_2' is not one of the engine's"),
        (_send_twice, "'matrix' was sent twice"),
        (_leave_out, "1 of 4 tensors .*'matrix'"),
    ],
)
def test_damage_names_the_tensor(damage: Callable[[Bucket], None], message: str) -> None:
    bucket = sent()
    damage(bucket)
    with pytest.raises(SyncError, match=message):
        open_buckets([bucket], SHAPES)
