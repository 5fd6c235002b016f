"""Bytes by component on one rank or device, in each phase of a stage.

What is counted is what this project's engines hold: DeepSpeed's ZeRO (arXiv:1910.02054 section 5) over ranks, experts
spread over `expert_parallel` of them first; AdamW; log-probabilities in chunks; vLLM with tensor parallelism, its
engines being the data parallelism and its experts spread over the same devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from configs.train import OffloadConfig, TrainerConfig
from pipeline.models.logprobs import CHUNK_TOKENS
from pipeline.planner.architecture import Architecture

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of an element."""
ZERO_BUCKET = 500_000_000
"""Elements that DeepSpeed's ZeRO 1 to 3 puts into one message (`reduce_bucket_size`, its default)."""
ZERO_LIVE = 1_000_000_000
"""Elements that ZeRO-3 leaves gathered, as they will be needed again (`stage3_max_live_parameters`, its default)."""
LOGIT_COPIES = 3
"""Arrays of a chunk's logits alive at once: the logits, their softmax, their gradient; float32."""

Parts = dict[str, float]
"""Bytes by component."""


@dataclass(frozen=True, slots=True)
class TrainLayout:
    """How a model is spread over training ranks."""

    ranks: int
    zero_stage: int
    expert_parallel: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    offload: OffloadConfig | None = None
    moments: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def of(cls, trainer: TrainerConfig, moments: Literal["float32", "bfloat16"]) -> "TrainLayout":
        """What a configuration sets."""
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
        extras += ["checkpointing"] * self.gradient_checkpointing
        if self.offload:
            extras += ["offloaded weights and optimizer" if self.offload.parameters else "offloaded optimizer"]
            extras += ["NVMe"] * bool(self.offload.nvme)
        return ", ".join([f"{self.ranks} ranks, ZeRO-{self.zero_stage}", *extras, f"{self.micro_batch_tokens} tokens"])


@dataclass(frozen=True, slots=True)
class RolloutLayout:
    """How engines are spread over devices."""

    engines: int
    tensor_parallel: int
    kv_cache: float
    """Bytes of KV cache on each device of an engine."""
    max_seqs: int
    """Completions an engine decodes at once at most."""
    fp8: tuple[Literal["weights", "kv_cache"], ...] = ()
    """What engines keep in FP8 (`rollout.fp8`)."""

    def __str__(self) -> str:
        cache = f"{self.kv_cache / 2**30:.1f} GiB of KV cache a device"
        fp8 = [f"{' and '.join(self.fp8)} in FP8"] if self.fp8 else []
        return ", ".join([f"{self.engines} engines", f"TP {self.tensor_parallel}", cache, *fp8])

    def width(self, part: Literal["weights", "kv_cache"], dtype: str) -> int:
        """Bytes of a number of `part`. Embedding and head, which stay as they are, are counted with the rest."""
        return 1 if part in self.fp8 else WIDTH[dtype]


def train_state(model: Architecture, layout: TrainLayout, dtype: str, *, reference: bool) -> tuple[Parts, Parts]:
    """What a training rank holds between steps: (on the device, in the machine's memory).

    reference: whether a frozen copy of the model stands beside it, sharded under ZeRO-3 only. What is offloaded to NVMe
    takes neither.
    """
    width, stage = WIDTH[dtype], layout.zero_stage
    local = model.dense + model.experts / layout.expert_parallel
    """Parameters of a rank that shards nothing but experts."""
    shard = model.total / layout.ranks
    device = {
        "weights": (shard if stage == 3 else local) * width,
        "gradients": (shard if stage >= 2 else local) * width,
    }
    if dtype == "bfloat16" and stage == 0:
        device["gradients"] += local * 4  # summed in float32
    owned = shard if stage else local
    optimizer = {"moments": owned * 2 * WIDTH[layout.moments]}
    if stage or dtype == "bfloat16":
        optimizer["master weights"] = owned * 4  # ZeRO keeps its own even of float32 weights
    if reference:
        # The reference is never spread by experts: it is loaded as a plain model.
        device["reference"] = (shard if stage == 3 else model.total) * width
    if layout.offload is None:
        return device | optimizer, {}
    host = optimizer | {"float32 gradients": owned * 4}
    if stage == 3:
        host["gradients"] = device.pop("gradients")
    if layout.offload.parameters:
        host |= {name: device.pop(name) for name in ("weights", "reference") if name in device}
    return device, {} if layout.offload.nvme else host


def train_working(model: Architecture, layout: TrainLayout, dtype: str, *, longest: int, lean: bool) -> Parts:
    """What the forward and backward passes add at their peak: on the device, beside `train_state`.

    longest: tokens of the longest sequence, which is never cut. lean: float32 on the CPU, with our own experts.
    """
    width = WIDTH[dtype]
    tokens = max(layout.micro_batch_tokens, longest)
    saved = model.saved_lean if lean else model.saved
    one_layer = saved / model.num_layers
    kept = model.hidden * model.num_layers + one_layer if layout.gradient_checkpointing else saved
    local = model.dense + model.experts / layout.expert_parallel
    parts = {
        "activations": tokens * kept * width,
        "backward": tokens * one_layer * width,  # the gradients of what a layer kept
        "logits": LOGIT_COPIES * min(tokens, CHUNK_TOKENS) * model.vocab * 4,
    }
    if layout.expert_parallel > 1:
        parts["all-to-all"] = 2 * tokens * model.experts_per_token * model.hidden * width
    if layout.zero_stage == 3:
        at_work = 2 * (model.layer + model.layer_experts / layout.expert_parallel)  # and the next, fetched meanwhile
        parts["gathered layers"] = max(at_work, min(local, ZERO_LIVE)) * width
    if layout.zero_stage and layout.ranks > 1:
        parts["buckets"] = min(ZERO_BUCKET, local) * width
    return parts


def update_working(model: Architecture, layout: TrainLayout) -> Parts:
    """What the optimizer's step adds, when activations are gone: float32 gradients of what a rank owns."""
    if layout.zero_stage == 0 or layout.offload:
        return {}
    owned = model.total / layout.ranks
    return {"float32 gradients": 4 * (owned if layout.zero_stage < 3 else min(owned, ZERO_LIVE))}


def step_working(model: Architecture, layout: TrainLayout, dtype: str, *, longest: int, lean: bool) -> Parts:
    """What a step adds at its peak, which is in the passes or in the update (see `train_working`)."""
    working = train_working(model, layout, dtype, longest=longest, lean=lean)
    return max(working, update_working(model, layout), key=total)


def rollout_state(model: Architecture, layout: RolloutLayout, dtype: str) -> Parts:
    """What a device of an awake engine holds; everything but attention's latent projections is cut by tensor
    parallelism."""
    cut = model.total / layout.tensor_parallel
    logits = layout.max_seqs * model.vocab * 4 / layout.tensor_parallel
    return {"weights": cut * layout.width("weights", dtype), "KV cache": layout.kv_cache, "logits": logits}


def kv_bytes(model: Architecture, layout: RolloutLayout, dtype: str) -> float:
    """Bytes of KV cache that one token takes on each device of an engine. MLA's latent is whole on all of them."""
    return model.kv * layout.width("kv_cache", dtype) / min(layout.tensor_parallel, model.kv_shards)


def sync_working(model: Architecture, layout: TrainLayout, dtype: str) -> Parts:
    """What sending the weights adds on a training rank: the layer that is whole there, and its copy on the way."""
    whole = model.layer + model.layer_experts
    return {"gathered layers": whole * WIDTH[dtype]} if layout.zero_stage == 3 or layout.expert_parallel > 1 else {}


def total(*parts: Parts) -> float:
    """Bytes of all components."""
    return sum(sum(of.values()) for of in parts)


def merged(*parts: Parts) -> Parts:
    """The components of all, those of one name added."""
    names: Iterator[str] = (name for of in parts for name in of)
    return {name: sum(of.get(name, 0.0) for of in parts) for name in dict.fromkeys(names)}
