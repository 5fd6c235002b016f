"""Seconds of a step by phase: a roofline with five constants, the same for all models and cluster sizes.

docs/planner.md names the figures they were fitted to, and the distance from published and measured steps.

Legend: x position in a completion.
"""

from dataclasses import dataclass
from math import ceil, exp, log

from pipeline.planner.architecture import ELEMENT_BYTES, Architecture
from pipeline.planner.devices import Cluster, Device
from pipeline.planner.memory import RolloutLayout, TrainLayout, kv_bytes

COMPUTE_SHARE = 0.71
"""Share of a data sheet's FLOP/s that matrix products reach. Fitted, together with MOVES."""
MOVES = 5
"""Times that each saved element crosses memory in a forward pass; a backward pass doubles it."""
MEMORY_SHARE = 0.7
"""Share of a data sheet's memory bandwidth that is reached. Assumed."""
NETWORK_SHARE = 0.7
"""Share of a data sheet's bandwidth between devices that is reached. Assumed."""
LAYER_SECONDS = {"gpu": 4.4e-4, "cpu": 4.2e-3}
"""Seconds of a decoder layer in one decoding step that no bandwidth explains: launches, small collectives, scheduling
in Python. Fitted."""
NVME_RATE = 3e9
"""Bytes a second of a device's share of its machine's NVMe drives. Assumed."""
SLICES = 32
"""Parts into which a rollout is cut; each has its own number of unfinished completions."""
PROOF_TOKENS = 512
"""Tokens of the sequences that prove a weight sync (pipeline.grpo.sync)."""


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts, completions and passes of one step."""

    prompts: int
    group_size: int
    """Completions of a prompt, or 1 for training on texts."""
    prompt_tokens: float
    mean_tokens: float
    """Mean tokens of a completion or a text."""
    max_tokens: int
    """Most tokens of a completion or a text."""
    longest: int
    """Most tokens of a row that can't be cut: a text, a comparison, or a completion with its prompt."""
    scored: float = 0
    """Forward passes beside training: the reference's, and the policy's own where the ratio needs one."""
    updates: int = 1

    @property
    def sequences(self) -> int:
        """Completions or texts of a step."""
        return self.prompts * self.group_size

    def trained_tokens(self, row_tokens: int) -> float:
        """Return the tokens of a step in rows of at most `row_tokens`; each row with completions of a prompt has it."""
        in_a_row = max(1, int((row_tokens - self.prompt_tokens) / self.mean_tokens))
        rows = ceil(self.group_size / in_a_row)
        return self.prompts * rows * self.prompt_tokens + self.sequences * self.mean_tokens

    @property
    def context(self) -> float:
        """Mean number of positions that a token attends to."""
        return self.prompt_tokens + self.mean_tokens / 2


def flops_rate(device: Device, dtype: str) -> float:
    """Return the FLOP/s that matrix products reach."""
    return device.flops[dtype] * (1 if device.is_cpu else COMPUTE_SHARE)


def memory_rate(device: Device) -> float:
    """Return the bytes a second that reads and writes of memory reach."""
    return device.bandwidth * (1 if device.is_cpu else MEMORY_SHARE)


def network_rate(cluster: Cluster, size: int) -> float:
    """Return the bytes a second and device, one way, that a group of `size` devices reaches."""
    return cluster.rate(size) * (1 if cluster.device.is_cpu else NETWORK_SHARE)


def forward_seconds(model: Architecture, tokens: float, context: float, device: Device) -> float:
    """Return the seconds of a forward pass on one device, each token attending to `context` positions.

    A GPU runs matrix products and the operations between them in turn; a CPU's caches let them overlap.
    """
    flops = tokens * (2 * model.active + context * model.attention_flops)
    saved = model.saved_lean if device.is_cpu else model.saved
    computing = flops / flops_rate(device, model.dtype)
    moving = tokens * saved * model.width * MOVES / memory_rate(device)
    return max(computing, moving) if device.is_cpu else computing + moving


def exchange_seconds(model: Architecture, tokens: float, layout: TrainLayout, cluster: Cluster) -> float:
    """Return the seconds of a forward pass's all-to-all on one rank: tokens to their experts and back, all layers."""
    if layout.expert_parallel == 1:
        return 0.0
    size = layout.expert_parallel
    sent = 2 * tokens * model.num_moe_layers * model.experts_per_token * model.hidden * model.width * (size - 1) / size
    inside = cluster.device.per_machine / size if cluster.crosses(size) else 1.0
    return sent * inside / network_rate(cluster, 1) + sent * (1 - inside) / network_rate(cluster, size)


def gather_seconds(model: Architecture, layout: TrainLayout, cluster: Cluster) -> float:
    """Return the seconds to gather, or to reduce and scatter, all weights of a rank's share of experts once.

    Offloaded weights come from the machine's memory or drives.
    """
    fetched = 0.0
    if layout.offload and layout.offload.parameters:
        rate = NVME_RATE if layout.offload.nvme else cluster.device.host_link * NETWORK_SHARE
        fetched = model.total / layout.ranks * model.width / rate
    if layout.ranks == 1:
        return fetched
    experts = model.experts / layout.expert_parallel if layout.ranks // layout.expert_parallel > 1 else 0.0
    return max((model.dense + experts) * model.width / network_rate(cluster, layout.ranks), fetched)


def train_seconds(
    model: Architecture, work: Work, layout: TrainLayout, cluster: Cluster, *, bubble: float = 0.0
) -> dict[str, float]:
    """Return the seconds of the phases `reference` (forward passes), `train` (forward and backward) and `update`.

    bubble: share of the time that a pipeline idles. This project's ranks have no pipeline; published runs do.
    """
    tokens = work.trained_tokens(layout.micro_batch_tokens) / layout.ranks
    micro_batches = ceil(tokens / work.updates / layout.micro_batch_tokens) * work.updates
    forward = forward_seconds(model, tokens, work.context, cluster.device)
    exchange = exchange_seconds(model, tokens, layout, cluster)
    gather = gather_seconds(model, layout, cluster)
    sharded = layout.zero_stage == 3
    passes = 4 if layout.gradient_checkpointing else 3  # a backward pass costs two forward ones
    # Gathering overlaps with computing; the all-to-all does not.
    scored = max(forward, gather * micro_batches * sharded) + exchange
    fetched = gather * micro_batches * 3 if sharded else 2 * gather * work.updates
    trained = max(passes * forward, fetched) + (passes - 1) * exchange
    return {
        "reference": work.scored * scored / (1 - bubble),
        "train": trained / (1 - bubble),
        "update": work.updates * update_seconds(model, layout, cluster.device),
    }


def update_seconds(model: Architecture, layout: TrainLayout, device: Device) -> float:
    """Return the seconds of AdamW: read and write master weights and two moments, read gradients, write weights."""
    local = model.dense + model.experts / layout.expert_parallel
    owned = model.trained / layout.ranks if layout.zero_stage else model.adapters or local
    state = owned * (8 + 4 * ELEMENT_BYTES[layout.moments])
    crossing = owned * (4 + model.width)
    if not layout.offload:
        return (state + crossing) / memory_rate(device)
    host = (state + crossing) / (device.host_bandwidth * MEMORY_SHARE) + crossing / (device.host_link * NETWORK_SHARE)
    return max(host, state / NVME_RATE if layout.offload.nvme else 0.0)


def generate_seconds(model: Architecture, work: Work, layout: RolloutLayout, device: Device) -> tuple[float, float]:
    """Return (seconds of a rollout, seconds of it that completions longer than the mean cost).

    Completions end at a constant rate, cut at `max_tokens`: the one law with the given mean. The rollout ends with
    the last completion; engines with more completions than room take them in waves.
    """
    capacity = layout.kv_cache / kv_bytes(model, layout)
    per_engine = work.sequences / layout.engines
    room = min(layout.max_seqs, capacity / (work.prompt_tokens + work.mean_tokens))
    waves = max(1, ceil(per_engine / max(room, 1)))
    rate = ending_rate(work.mean_tokens, work.max_tokens)
    width = longest_of(work.sequences, rate, work.max_tokens) / SLICES
    seconds = 0.0
    for x in ((part + 0.5) * width for part in range(SLICES)):
        unfinished = max(1.0, per_engine / waves * exp(-rate * x))
        seconds += width * decode_seconds(model, unfinished, work.prompt_tokens + x, layout, device)
    even = work.mean_tokens * decode_seconds(model, per_engine / waves, work.context, layout, device)
    prompts = work.prompts / layout.engines * work.prompt_tokens / layout.tensor_parallel
    prefill = forward_seconds(model, prompts, work.prompt_tokens / 2, device)
    # An engine starts a completion as soon as another ends, so only the last wave waits for its longest.
    return prefill + seconds + (waves - 1) * even, max(seconds - even, 0.0)


def decode_seconds(
    model: Architecture, sequences: float, context: float, layout: RolloutLayout, device: Device
) -> float:
    """Return the seconds of one decoding step of an engine: it reads the weights in use and the KV cache."""
    in_use = 1.0 - (1 - model.experts_per_token / model.num_experts) ** sequences if model.experts else 0.0
    elements = model.dense - model.embedding + model.experts * in_use
    weights = elements * layout.width("weights", model) / layout.tensor_parallel
    cache = sequences * context * kv_bytes(model, layout)
    flops = sequences * (2 * model.active + context * model.decode_flops) / layout.tensor_parallel
    bound = max((weights + cache) / memory_rate(device), flops / flops_rate(device, model.dtype))
    return bound + model.num_layers * LAYER_SECONDS["cpu" if device.is_cpu else "gpu"]


def ending_rate(mean: float, longest: int) -> float:
    """Return the rate per token at which completions end: E[min(X, longest)] = mean for an exponential X.

    It is 0 where all completions reach `longest`.
    """
    if mean >= longest:
        return 0.0
    low, high = 1e-9 / longest, 50 / mean
    for _ in range(80):
        rate = (low + high) / 2
        low, high = (rate, high) if (1 - exp(-rate * longest)) / rate > mean else (low, rate)
    return (low + high) / 2


def longest_of(sequences: int, rate: float, longest: int) -> float:
    """Return the expected tokens of the longest of `sequences` completions."""
    harmonic = log(sequences) + 0.5772 + 1 / (2 * sequences) if sequences > 1 else 1.0
    return min(longest, harmonic / rate) if rate else float(longest)


def sync_seconds(model: Architecture, layout: TrainLayout, cluster: Cluster) -> float:
    """Return the seconds to send all weights from one rank to the engines and to prove their arrival.

    The weights go from the device to the host's memory, and from there to each machine in a chain.
    """
    sent, device = model.total * model.width, cluster.device
    share = 1 if device.is_cpu else NETWORK_SHARE
    host = 2 * sent / (device.host_link * share) + 2 * sent / (device.host_bandwidth * share)  # copies, checksums
    across = sent / (device.network * share) if cluster.crosses(layout.ranks) else 0.0
    gather = sent / network_rate(cluster, layout.ranks) if layout.ranks > 1 and layout.zero_stage == 3 else 0.0
    return host + across + gather + 2 * forward_seconds(model, PROOF_TOKENS, PROOF_TOKENS / 16, device)
