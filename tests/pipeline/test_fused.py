"""Weights on their way out: the tensors and bytes that `transformers` would save, and none of them copied."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from pipeline.weights.fresh import create_model
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import load_model
from rollout.checkpoint import checkpoint_shapes
from rollout.weights import Bucket, open_bucket, to_buckets
from tests.pipeline.small_models import SMALLEST

CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SMALLEST, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SMALLEST, num_local_experts=4),
    "llama": LlamaConfig(**SMALLEST),
}


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["deepseek_v3", *CONFIGS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / request.param
    return create_model("tiny", 0, made) if request.param == "deepseek_v3" else saved(CONFIGS[request.param], made)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def packed(tensors: dict[str, torch.Tensor]) -> list[Bucket]:
    return list(to_buckets(tensors.items(), 1))


def copied_bytes(model: PreTrainedModel, buckets: list[Bucket]) -> int:
    """Bytes of payloads that lie outside the model's own memory."""
    storages = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    own = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    outside = 0
    for payload in (payload for bucket in buckets for payload in bucket.payloads):
        first = payload.__array_interface__["data"][0]
        if not any(start <= first and first + payload.nbytes <= end for start, end in own):
            outside += payload.nbytes
    return outside


def test_names_order_and_bytes_are_those_of_transformers(folder: Path) -> None:
    model = load_model(folder, "float32")
    expected = packed(revert_weight_conversion(model, weights(model)))
    sent = packed(checkpoint_tensors(model, weights(model)))
    records = [record for bucket in sent for record in bucket.records]
    assert records == [record for bucket in expected for record in bucket.records]  # checksums included
    assert {record.name: record.shape for record in records} == checkpoint_shapes(folder)
    for bucket, other in zip(sent, expected, strict=True):
        assert all(map(np.array_equal, bucket.payloads, other.payloads))


def test_no_byte_is_copied_before_the_object_store_nor_after_it(folder: Path) -> None:
    """What remains are the two copies that must be: into the store's memory, and into the engine's parameter."""
    model = load_model(folder, "float32")
    buckets = packed(checkpoint_tensors(model, weights(model)))
    assert copied_bytes(model, buckets) == 0
    # a store keeps what pickle hands out of band, which is the model's memory itself
    handed: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(buckets, protocol=5, buffer_callback=handed.append)
    outside = [np.frombuffer(buffer, np.uint8) for buffer in handed]
    payloads = [payload for bucket in buckets for payload in bucket.payloads]
    assert [each.__array_interface__["data"][0] for each in outside] == [
        each.__array_interface__["data"][0] for each in payloads
    ]
    # and what is read there is a view of the store's memory
    stored = [each.copy() for each in outside]
    arrived = [pair for bucket in pickle.loads(pickled, buffers=stored) for pair in open_bucket(bucket)]
    assert [tensor.data_ptr() for _, tensor in arrived] == [each.__array_interface__["data"][0] for each in stored]


def test_the_count_can_tell(folder: Path) -> None:
    """transformers' own way copies gate and up projections: half to two thirds of a layer of experts."""
    model = load_model(folder, "float32")
    copied = copied_bytes(model, packed(revert_weight_conversion(model, weights(model))))
    fused = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.endswith("gate_up_proj"))
    assert copied == fused
    assert (fused > 0) == any(isinstance(each, WeightConverter) for each in model._weight_conversions)
