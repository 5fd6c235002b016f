"""Buckets: packed tensors come out unchanged, and damaged ones are named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.device_memory import SharedBucket, SharedMemory
from rollout.types import SyncError, TensorRecord
from rollout.weights import (
    Bucket,
    HeldBytes,
    Manifest,
    as_bytes,
    as_tensor,
    open_bucket,
    open_tensor,
    to_buckets,
    weighted_sum,
)

CPU = torch.device("cpu")
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


def receive(*buckets: Bucket) -> tuple[list[TensorRecord], list[tuple[str, torch.Tensor]]]:
    """Check buckets as an engine does; return their manifest and tensors."""
    manifest, tensors = Manifest(SHAPES), []
    for bucket in buckets:
        manifest.add(bucket.records)
        tensors += open_bucket(bucket)
    return manifest.complete(), tensors


def test_what_is_packed_comes_out() -> None:
    bucket = sent()
    assert all(payload.dtype == np.uint8 and payload.ndim == 1 for payload in bucket.payloads)
    records, tensors = receive(bucket)
    assert records == bucket.records
    assert [record.dtype for record in records] == ["float32", "bfloat16", "float32", "float32"]
    for name, tensor in tensors:
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_nothing_is_copied_on_the_way() -> None:
    weight = torch.ones(4)
    [bucket] = to_buckets([("weight", weight)], 1)
    [(_, arrived)] = open_bucket(bucket)
    assert arrived.data_ptr() == weight.data_ptr()


def in_shared_memory(bucket: Bucket) -> tuple[SharedBucket, SharedMemory]:
    memory = SharedMemory([as_tensor(payload) for payload in bucket.payloads], CPU)
    return SharedBucket(bucket.records, memory.starts, memory.sizes, {"cpu": memory.handle}), memory


def test_shared_memory_holds_the_same_bytes_and_outlives_its_sender() -> None:
    shared, memory = in_shared_memory(sent())
    mapped = shared.map(CPU)
    del memory
    assert not Path(shared.handles["cpu"]).exists(), "only the mapping keeps the memory"
    for record, payload in zip(shared.records, mapped, strict=True):
        assert payload.data_ptr() % 64 == 0
        assert torch.equal(open_tensor(record, payload), TENSORS[record.name])


def test_shared_memory_of_ranks_must_be_equal_and_on_the_engines_device() -> None:
    (shared, _), (same, _), (other, _) = (in_shared_memory(sent()) for _ in range(3))
    assert shared.merged([same]).records == shared.records
    other.records[1] = replace(other.records[1], checksum=0)
    with pytest.raises(SyncError, match="'half' is not the same on all ranks"):
        shared.merged([other])
    elsewhere = replace(shared, handles={"GPU-1": None, "GPU-2": None})
    with pytest.raises(SyncError, match=r"'matrix' is on no rank .*device cpu .* on GPU-1, GPU-2: .*placement"):
        elsewhere.map(CPU)


def test_a_bucket_counts_until_its_last_tensor_is_gone() -> None:
    def opened() -> dict[str, torch.Tensor]:
        payloads = [as_tensor(payload.copy()) for payload in sent().payloads]
        held.hold(payloads)
        return {record.name: open_tensor(record, x) for record, x in zip(sent().records, payloads, strict=True)}

    held, size = HeldBytes(), sum(payload.nbytes for payload in sent().payloads)
    kept = opened()["half"][1:]  # a view, as vLLM keeps of a module that is not complete
    other = opened()
    assert held.peak == 2 * size
    del kept, other
    opened()
    assert held.peak == 2 * size, "the first two are gone"


def test_a_sum_on_a_device_sees_each_bit_and_the_order_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words 1 and 2 give 1 x 1 + 2 x 3 = 7, exchanged 2 x 1 + 1 x 3 = 5; three bytes more are a third word."""
    words = torch.tensor([1, 2], dtype=torch.int32)
    assert weighted_sum(as_bytes(words)) == 7
    assert weighted_sum(as_bytes(words.flip(0))) == 5
    assert weighted_sum(torch.cat([as_bytes(words), torch.tensor([1, 0, 0], dtype=torch.uint8)])) == 7 + 5
    payload = as_bytes(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    whole = weighted_sum(payload)
    for bit in range(0, 8 * len(payload), 97):
        damaged = payload.clone()
        damaged[bit // 8] ^= 1 << (bit % 8)
        assert weighted_sum(damaged) != whole
    monkeypatch.setattr("rollout.weights._BLOCK_WORDS", 7)
    assert weighted_sum(payload) == whole, "blocks make no difference"


def test_read_only_memory_is_no_reason_to_warn(recwarn: pytest.WarningsRecorder) -> None:
    bucket = sent()
    for payload in bucket.payloads:
        payload.flags.writeable = False
    open_bucket(bucket)
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
        receive(bucket)
