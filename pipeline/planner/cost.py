"""Seconds of a step by phase: a roofline with five constants, the same for all models and sizes of clusters.

docs/planner.md says what they were fitted to, and how far the model is from published and measured steps.

Legend: P prompts, G completions of each; x position in a completion; b completions that an engine still decodes.
"""

from dataclasses import dataclass
from math import ceil, exp, log

from pipeline.planner.architecture import Architecture
from pipeline.planner.devices import Cluster, Device
from pipeline.planner.memory import WIDTH, RolloutLayout, TrainLayout, kv_bytes

COMPUTE_SHARE = 0.71
"""Share of a data sheet's FLOP/s that matrix products reach. Fitted, together with MOVES."""
MOVES = 5
"""How often each element kept for the backward pass crosses memory in a forward pass; a backward pass doubles it."""
MEMORY_SHARE = 0.7
"""Share of a data sheet's memory bandwidth that is reached. Assumed."""
NETWORK_SHARE = 0.7
"""Share of a data sheet's bandwidth between devices that is reached. Assumed."""
LAYER_SECONDS = {"gpu": 4.4e-4, "cpu": 4.2e-3}
"""Seconds of a decoder layer in one step of decoding that no bandwidth explains: launches, small collectives, Python's
scheduling. Fitted."""
NVME_RATE = 3e9
"""Bytes a second that a device's share of a machine's NVMe drives gives. Assumed."""
SLICES = 32
"""Parts that a rollout is cut into, the completions that are left counted in each."""
PROOF_TOKENS = 512
"""Tokens that prove a weight sync (pipeline.grpo.sync)."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes."""

    prompts: int
    group_size: int
    """Completions of a prompt, or 1 for training on given texts."""
    prompt_tokens: float
    mean_tokens: float
    """Tokens of a completion or a text, on average."""
    max_tokens: int
    """Tokens that a completion or a text may have."""
    longest: int
    """Tokens that a completion with its prompt, or a text, may have."""
    scored: int = 0
    """Forward passes over the step's tokens beside training: the reference's, and the policy's own where needed."""
    updates: int = 1

    @property
    def sequences(self) -> int:
        """Completions or texts of a step."""
        return self.prompts * self.group_size

    @property
    def tokens(self) -> float:
        """Tokens that are trained on or read; a prompt is computed once for its completions."""
        return self.prompts * self.prompt_tokens + self.sequences * self.mean_tokens

    @property
    def context(self) -> float:
        """Positions that a token attends to, on average."""
        return self.prompt_tokens + self.mean_tokens / 2


def flops_rate(device: Device, dtype: str) -> float:
    """FLOP/s that matrix products reach."""
    return device.flops[dtype] * (1 if device.measured else COMPUTE_SHARE)


def memory_rate(device: Device) -> float:
    """Bytes a second that are reached."""
    return device.bandwidth * (1 if device.measured else MEMORY_SHARE)


def network_rate(cluster: Cluster, size: int) -> float:
    """Bytes a second and device, one way, that are reached within a group of so many devices."""
    return cluster.rate(size) * (1 if cluster.device.measured else NETWORK_SHARE)


def forward_seconds(model: Architecture, tokens: float, context: float, device: Device, dtype: str) -> float:
    """Seconds of a forward pass over so many tokens on one device, each attending to `context` positions.

    A GPU runs matrix products and what lies between them one after the other; a CPU's caches let them overlap.
    """
    flops = tokens * (2 * model.active + context * model.attention_flops)
    saved = model.saved_lean if device.measured else model.saved
    traffic = tokens * saved * WIDTH[dtype] * MOVES
    computing, moving = flops / flops_rate(device, dtype), traffic / memory_rate(device)
    return max(computing, moving) if device.measured else computing + moving


def exchange_seconds(model: Architecture, tokens: float, layout: TrainLayout, cluster: Cluster, dtype: str) -> float:
    """Seconds of a forward pass's all-to-all on one rank: every token to its experts and back, in every layer."""
    if layout.expert_parallel == 1:
        return 0.0
    size = layout.expert_parallel
    away = (size - 1) / size
    sent = 2 * tokens * model.num_moe_layers * model.experts_per_token * model.hidden * WIDTH[dtype] * away
    inside = cluster.device.per_machine / size if cluster.crosses(size) else 1.0
    within, across = sent * inside, sent * (1 - inside)
    return within / network_rate(cluster, 1) + across / network_rate(cluster, size)


def gather_seconds(model: Architecture, layout: TrainLayout, cluster: Cluster, dtype: str) -> float:
    """Seconds to gather, or to reduce and scatter, all weights of a rank's share of experts once; those that are
    offloaded come from the machine."""
    fetched = 0.0
    if layout.offload and layout.offload.parameters:
        rate = NVME_RATE if layout.offload.nvme else cluster.device.host_link * NETWORK_SHARE
        fetched = model.total / layout.ranks * WIDTH[dtype] / rate
    if layout.ranks == 1:
        return fetched
    dense = model.dense * WIDTH[dtype] / network_rate(cluster, layout.ranks)
    copies = layout.ranks // layout.expert_parallel
    experts = model.experts / layout.expert_parallel * WIDTH[dtype] if copies > 1 else 0.0
    return max(dense + experts / network_rate(cluster, layout.ranks), fetched)


def train_seconds(
    model: Architecture, work: Work, layout: TrainLayout, cluster: Cluster, dtype: str, *, bubble: float = 0.0
) -> dict[str, float]:
    """Seconds of the phases `reference` (forward passes), `train` (forward and backward) and `update`.

    bubble: share of the time that a pipeline stands still; these ranks have no pipeline, published ones do.
    """
    tokens = work.tokens / layout.ranks
    micro_batches = ceil(tokens / work.updates / layout.micro_batch_tokens) * work.updates
    device = cluster.device
    forward = forward_seconds(model, tokens, work.context, device, dtype)
    exchange = exchange_seconds(model, tokens, layout, cluster, dtype)
    gather = gather_seconds(model, layout, cluster, dtype)
    sharded = layout.zero_stage == 3
    passes = 4 if layout.gradient_checkpointing else 3  # a backward pass costs two forward ones
    # Gathering runs beside computing; the all-to-all is waited for.
    reads = max(forward, gather * micro_batches * sharded) + exchange
    fetched = gather * micro_batches * 3 if sharded else 2 * gather * work.updates
    trained = max(passes * forward, fetched) + (passes - 1) * exchange
    return {
        "reference": work.scored * reads / (1 - bubble),
        "train": trained / (1 - bubble),
        "update": work.updates * update_seconds(model, layout, device, dtype),
    }


def update_seconds(model: Architecture, layout: TrainLayout, device: Device, dtype: str) -> float:
    """Seconds of AdamW: master weights and two moments read and written, gradients read, weights written."""
    local = model.dense + model.experts / layout.expert_parallel
    owned = model.total / layout.ranks if layout.zero_stage else local
    state = owned * (8 + 4 * WIDTH[layout.moments])
    moved = state + owned * (4 + WIDTH[dtype])
    if layout.offload:
        crossed = owned * (4 + WIDTH[dtype])
        updated = moved / (device.host_bandwidth * MEMORY_SHARE) + crossed / (device.host_link * NETWORK_SHARE)
        return max(updated, state / NVME_RATE if layout.offload.nvme else 0.0)
    return moved / memory_rate(device)


def generate_seconds(
    model: Architecture, work: Work, layout: RolloutLayout, device: Device, dtype: str
) -> tuple[float, float]:
    """(seconds of a rollout, what it takes longer than if all completions were of the mean length).

    Completions end at a constant rate, cut at `max_tokens`: the one law with the given mean. The rollout ends with
    the last of them; engines that have more completions than room take them in waves.
    """
    capacity = layout.kv_cache / kv_bytes(model, layout, dtype)
    per_engine = work.sequences / layout.engines
    room = min(layout.max_seqs, capacity / (work.prompt_tokens + work.mean_tokens))
    waves = max(1, ceil(per_engine / max(room, 1)))
    rate = ending_rate(work.mean_tokens, work.max_tokens)
    last = longest_of(work.sequences, rate, work.max_tokens)
    width = last / SLICES
    seconds = 0.0
    for part in range(SLICES):
        x = (part + 0.5) * width
        left = max(1.0, per_engine / waves * exp(-rate * x))
        seconds += width * decode_seconds(model, left, work.prompt_tokens + x, layout, device, dtype)
    even = work.mean_tokens * decode_seconds(model, per_engine / waves, work.context, layout, device, dtype)
    prompts = work.prompts / layout.engines * work.prompt_tokens / layout.tensor_parallel
    prefill = forward_seconds(model, prompts, work.prompt_tokens / 2, device, dtype)
    # The first waves need not wait for their last: an engine takes the next completion when one ends.
    return prefill + seconds + (waves - 1) * even, max(seconds - even, 0.0)


def decode_seconds(
    model: Architecture, sequences: float, context: float, layout: RolloutLayout, device: Device, dtype: str
) -> float:
    """Seconds of one token for each of an engine's sequences: weights that are met and the KV cache are read."""
    met = 1.0 - (1 - model.experts_per_token / model.num_experts) ** sequences if model.experts else 0.0
    width = layout.width("weights", dtype)
    weights = (model.dense - model.embedding + model.experts * met) * width / layout.tensor_parallel
    cache = sequences * context * kv_bytes(model, layout, dtype)
    flops = sequences * (2 * model.active + context * model.decode_flops) / layout.tensor_parallel
    bound = max((weights + cache) / memory_rate(device), flops / flops_rate(device, dtype))
    return bound + model.num_layers * LAYER_SECONDS["cpu" if device.measured else "gpu"]


def ending_rate(mean: float, longest: int) -> float:
    """The rate at which completions end, a token: E[min(X, longest)] = mean for an exponential X; 0 where all of them
    reach `longest`."""
    if mean >= longest:
        return 0.0
    low, high = 1e-9 / longest, 50 / mean
    for _ in range(80):
        rate = (low + high) / 2
        low, high = (rate, high) if (1 - exp(-rate * longest)) / rate > mean else (low, rate)
    return (low + high) / 2


def longest_of(sequences: int, rate: float, longest: int) -> float:
    """Tokens of the longest of so many completions, on average."""
    harmonic = log(sequences) + 0.5772 + 1 / (2 * sequences) if sequences > 1 else 1.0
    return min(longest, harmonic / rate) if rate else float(longest)


def sync_seconds(model: Architecture, layout: TrainLayout, cluster: Cluster, dtype: str) -> float:
    """Seconds to bring all weights from one rank to the engines, and to prove it: off the device and onto the host's
    memory, from there to each machine in a chain."""
    sent = model.total * WIDTH[dtype]
    device = cluster.device
    share = 1 if device.measured else NETWORK_SHARE
    host = 2 * sent / (device.host_link * share) + 2 * sent / (device.host_bandwidth * share)  # copies, checksums
    across = sent / (device.network * share) if cluster.crosses(layout.ranks) else 0.0
    gather = sent / network_rate(cluster, layout.ranks) if layout.ranks > 1 and layout.zero_stage == 3 else 0.0
    proof = 2 * forward_seconds(model, PROOF_TOKENS, PROOF_TOKENS / 16, device, dtype)
    return host + across + gather + proof
