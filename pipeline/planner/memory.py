"""Bytes by component on one rank or device, in each phase of a stage.

The components are those of this project's engines: DeepSpeed's ZeRO (arXiv:1910.02054 section 5) over ranks, after
experts are spread over `expert_parallel` of them; AdamW; log-probabilities in chunks; vLLM with tensor parallelism,
engines as its data parallelism, and experts spread over the same devices.
"""

from dataclasses import dataclass
from typing import Literal

from configs.sampling import RolloutConfig
from configs.train import OffloadConfig, TrainerConfig
from pipeline.models.logprobs import CHUNK_TOKENS
from pipeline.planner.architecture import ELEMENT_BYTES, Architecture
from pipeline.planner.devices import GIB

ZERO_BUCKET = 500_000_000
"""Elements in one message of DeepSpeed's ZeRO 1 to 3 (`reduce_bucket_size`, its default)."""
ZERO_LIVE = 1_000_000_000
"""Elements that ZeRO-3 leaves gathered for their next use (`stage3_max_live_parameters`, its default)."""
LOGIT_COPIES = 3
"""Float32 arrays of a chunk's logits alive at once: the logits, their softmax, their gradient."""

Parts = dict[str, float]
"""Bytes by component."""


@dataclass(frozen=True, slots=True)
class TrainLayout:
    """Spread of a model over training ranks."""

    ranks: int
    zero_stage: int
    expert_parallel: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    offload: OffloadConfig | None = None
    moments: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def of(cls, trainer: TrainerConfig, moments: Literal["float32", "bfloat16"]) -> "TrainLayout":
        """Return the layout that a configuration sets."""
        return cls(
            trainer.num_ranks,
            trainer.zero_stage,
            trainer.expert_parallel_size,
            trainer.micro_batch_tokens,
            trainer.gradient_checkpointing,
            trainer.offload,
            moments,
        )

    def __str__(self) -> str:
        extras = [f"EP {self.expert_parallel}"] if self.expert_parallel > 1 else []
        extras += ["checkpointing"] if self.gradient_checkpointing else []
        if self.offload:
            extras += ["offloaded weights and optimizer" if self.offload.parameters else "offloaded optimizer"]
            extras += ["NVMe"] if self.offload.nvme else []
        return ", ".join([f"{self.ranks} ranks, ZeRO-{self.zero_stage}", *extras, f"{self.micro_batch_tokens} tokens"])


@dataclass(frozen=True, slots=True)
class RolloutLayout:
    """Spread of engines over devices."""

    engines: int
    tensor_parallel: int
    kv_cache: float
    """Bytes of KV cache on each device of an engine."""
    max_seqs: int
    """Most completions that an engine decodes at once."""
    fp8: tuple[Literal["weights", "kv_cache"], ...] = ()
    """Parts in FP8 (`rollout.fp8`)."""

    @classmethod
    def of(cls, rollout: RolloutConfig) -> "RolloutLayout":
        """Return the layout that a configuration sets, without a KV cache where its size is `auto`."""
        return cls(
            rollout.num_engines,
            rollout.tensor_parallel_size,
            0.0 if rollout.kv_cache_gib == "auto" else rollout.kv_cache_gib * GIB,
            rollout.max_num_seqs,
            tuple(rollout.fp8),
        )

    def __str__(self) -> str:
        cache = f"{self.kv_cache / GIB:.1f} GiB of KV cache a device"
        fp8 = [f"{' and '.join(self.fp8)} in FP8"] if self.fp8 else []
        return ", ".join([f"{self.engines} engines", f"TP {self.tensor_parallel}", cache, *fp8])

    def width(self, part: Literal["weights", "kv_cache"], model: Architecture) -> int:
        """Return the bytes of an element of `part`. Embedding and head, which FP8 leaves alone, count with the rest."""
        return 1 if part in self.fp8 else model.width


def train_state(model: Architecture, layout: TrainLayout, *, reference: Architecture | None) -> tuple[Parts, Parts]:
    """Return what a training rank holds between steps: (on the device, in the machine's memory).

    reference: the frozen model that stands beside it, if any; only ZeRO-3 shards it. Parts that are offloaded to
    NVMe are in neither.
    """
    width, stage = model.width, layout.zero_stage
    local = model.dense + model.experts / layout.expert_parallel  # parameters of a rank that shards experts alone
    shard = model.total / layout.ranks
    trained = model.adapters or local
    owned = model.trained / layout.ranks if stage else trained
    device = {
        "weights": (shard if stage == 3 else local) * width + model.adapters * width,
        "gradients": (owned if stage >= 2 else trained) * 4,  # in float32, whatever the weights are
    }
    if model.dtype == "bfloat16" and stage == 0:
        device["gradients"] += trained * 4  # flattened for the update
    optimizer = {"moments": owned * 2 * ELEMENT_BYTES[layout.moments]}
    if stage or model.dtype == "bfloat16":
        optimizer["master weights"] = owned * 4  # ZeRO has a copy even of float32 weights
    if reference:  # without expert parallelism
        device["reference"] = reference.total / (layout.ranks if stage == 3 else 1) * reference.width
    if layout.offload is None:
        return device | optimizer, {}
    host = optimizer | {"float32 gradients": owned * 4}
    if stage == 3:
        host["gradients"] = device.pop("gradients")
    if layout.offload.parameters:
        host |= {name: device.pop(name) for name in ("weights", "reference") if name in device}
    return device, {} if layout.offload.nvme else host


def train_working(model: Architecture, layout: TrainLayout, *, longest: int, lean: bool) -> Parts:
    """Return what the forward and backward passes add to `train_state` at their peak, on the device.

    longest: tokens of the longest row that can't be cut. lean: float32 on the CPU, with the project's experts.
    """
    tokens = max(layout.micro_batch_tokens, longest)
    saved = model.saved_lean if lean else model.saved
    one_layer = saved / model.num_layers
    stored = model.hidden * model.num_layers + one_layer if layout.gradient_checkpointing else saved
    local = model.dense + model.experts / layout.expert_parallel
    parts = {
        "activations": tokens * stored * model.width,
        "backward": tokens * one_layer * model.width,  # the gradients of one layer's saved activations
        "logits": LOGIT_COPIES * min(tokens, CHUNK_TOKENS) * model.vocab * 4,
    }
    if layout.expert_parallel > 1:
        parts["all-to-all"] = 2 * tokens * model.experts_per_token * model.hidden * model.width
    if layout.zero_stage == 3:
        in_use = 2 * (model.layer + model.layer_experts / layout.expert_parallel)  # this layer and the next, prefetched
        parts["gathered layers"] = max(in_use, min(local, ZERO_LIVE)) * model.width
    if layout.zero_stage and layout.ranks > 1:
        parts["buckets"] = min(ZERO_BUCKET, model.adapters or local) * 4  # messages are float32
    return parts


def update_working(model: Architecture, layout: TrainLayout) -> Parts:
    """Return what the optimizer's step adds once activations are freed: float32 gradients of a rank's own shard."""
    if layout.zero_stage == 0 or layout.offload:
        return {}
    owned = model.trained / layout.ranks
    return {"float32 gradients": 4 * (owned if layout.zero_stage < 3 else min(owned, ZERO_LIVE))}


def step_working(model: Architecture, layout: TrainLayout, *, longest: int, lean: bool) -> Parts:
    """Return what a step adds at its peak, in the passes or in the update (see `train_working`)."""
    working = train_working(model, layout, longest=longest, lean=lean)
    return max(working, update_working(model, layout), key=total)


def rollout_state(model: Architecture, layout: RolloutLayout) -> Parts:
    """Return what a device of an awake engine holds. Tensor parallelism cuts all but MLA's latent projections."""
    return {
        "weights": model.total / layout.tensor_parallel * layout.width("weights", model),
        "KV cache": layout.kv_cache,
        "logits": layout.max_seqs * model.vocab * 4 / layout.tensor_parallel,
    }


def kv_bytes(model: Architecture, layout: RolloutLayout) -> float:
    """Return the bytes of KV cache that one token takes on each device of an engine."""
    return model.kv * layout.width("kv_cache", model) / min(layout.tensor_parallel, model.kv_shards)


def sync_working(model: Architecture, layout: TrainLayout) -> Parts:
    """Return what sending the weights adds on a training rank: one gathered layer and its copy in flight."""
    sharded = layout.zero_stage == 3 or layout.expert_parallel > 1
    return {"gathered layers": (model.layer + model.layer_experts) * model.width} if sharded else {}


def total(*parts: Parts) -> float:
    """Add up the bytes of all components."""
    return sum(sum(components.values()) for components in parts)


def merged(*parts: Parts) -> Parts:
    """Merge components, adding those of one name."""
    names = dict.fromkeys(name for components in parts for name in components)
    return {name: sum(components.get(name, 0.0) for components in parts) for name in names}
