"""Parameters, saved activations, KV cache and FLOPs of a model, counted on its `transformers` class.

The model is built on the meta device, where weights have shapes and no bytes.

Legend: D model width, I width of an expert or MLP, E experts, K experts a token is sent to, H attention heads.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import configs
from configs.lora import LoraConfig
from pipeline.models.lora import adapted_layers
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.architecture import architecture_file
from rollout.checkpoint import described_dtype

HUB = {
    "deepseek-ai/DeepSeek-V2": "deepseek_v2",
    "deepseek-ai/DeepSeek-V2-Chat": "deepseek_v2",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek_v2_lite",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek_v2_lite",
    "deepseek-ai/DeepSeek-V3": "deepseek_v3",
    "deepseek-ai/DeepSeek-V3-Base": "deepseek_v3",
    "deepseek-ai/DeepSeek-V3-0324": "deepseek_v3",
    "deepseek-ai/DeepSeek-R1": "deepseek_v3",
    "Qwen/Qwen3-1.7B": "qwen3_1_7b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "Qwen/Qwen3-30B-A3B": "qwen3_30b_a3b",
    "Qwen/Qwen3-235B-A22B": "qwen3_235b_a22b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2_135m",
}
"""Hub models whose architecture is shipped, so that planning fetches nothing."""
PUBLISHED = Path(configs.__file__).parent / "models" / "published"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model in numbers. Only `mtp` counts the parameters of multi-token-prediction modules."""

    name: str
    family: str
    """The config's `model_type`."""
    total: int
    """All parameters."""
    experts: int
    """Parameters of the routed experts, all layers."""
    embedding: int
    """Parameters of the input embedding, of which a token reads one row; 0 where it is tied to the head."""
    mtp: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    hidden: int
    positions: int
    """Longest input in tokens."""
    vocab: int
    heads: int
    layer: int
    """Parameters of the largest decoder layer without its routed experts."""
    layer_experts: int
    """Parameters of the routed experts of one layer."""
    kv: int
    """Elements of a token's KV cache, all layers. Of MLA: the latent and its rotary key."""
    kv_shards: int
    """Parts into which tensor parallelism can cut the KV cache. MLA's latent is whole on every device."""
    saved: int
    """Elements of a token that autograd saves for the backward pass, all layers, in bfloat16 on a GPU."""
    saved_lean: int
    """The same in float32 on the CPU, where the project has its own experts and norms."""
    attention_flops: int
    """FLOPs of a forward pass per attended position, all layers, in training."""
    decode_flops: int
    """FLOPs per attended position in decoding, where MLA works on the latent."""
    dtype: str = "bfloat16"
    """Precision of weights and activations."""
    adapters: int = 0
    """Parameters of the adapters that are trained instead of all weights; 0 without adapters."""

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def active(self) -> int:
        """Parameters that compute a token: without the experts it is not routed to, and without the embedding."""
        unused = self.experts * (self.num_experts - self.experts_per_token) // self.num_experts if self.experts else 0
        return self.total - unused - self.embedding

    @property
    def trained(self) -> int:
        """Parameters with a gradient and moments."""
        return self.adapters or self.total

    @property
    def dense(self) -> int:
        """Parameters outside of the routed experts."""
        return self.total - self.experts


def architecture_of(model: str, dtype: str = "bfloat16", lora: LoraConfig | None = None) -> Architecture:
    """Return the architecture of a checkpoint's folder, a hub name in HUB, a config.json or a shipped `init_config`.

    dtype: precision; `auto` takes the one that the config.json describes, bfloat16 where it does not.
    lora: the adapters to count. Raises ValueError with the remedy for an unknown model, for one that `transformers`
    does not know, and for adapters of layers that it does not have.

    Example:
        architecture_of("deepseek-ai/DeepSeek-V3").active  # 36.6 billion
    """
    if model in HUB:
        config_json = PUBLISHED / f"{HUB[model]}.json"
    elif not (config_json := Path(model).expanduser() / "config.json").is_file():
        if "/" in model and not model.endswith(".json"):
            raise ValueError(
                f"model '{model}': its architecture is not shipped, and planning fetches nothing; give its config.json "
                f"by --model-config FILE. Shipped: {', '.join(HUB)}"
            )
        config_json = architecture_file(model)
    layers = adapted_layers(meta_model(config_json), lora).values() if lora else ()
    adapters = sum((lora.rank if lora else 0) * sum(layer.weight.shape) for layer in layers)
    architecture = read_architecture(config_json)
    if dtype == "auto":
        dtype = described_dtype(json.loads(config_json.read_text(encoding="utf-8"))) or architecture.dtype
    return replace(architecture, dtype=dtype, adapters=adapters)


@cache
def read_architecture(config_json: Path) -> Architecture:
    """Count the model that a `transformers` config.json describes. Raises ValueError where the planner can't."""
    model = meta_model(config_json)
    try:
        return _counted(model, config_json.stem if config_json.stem != "config" else config_json.parent.name)
    except (AttributeError, TypeError, StopIteration, IndexError) as error:
        raise ValueError(f"{config_json}: the planner can't count a {type(model).__name__} ({error})") from error


def as_reward_model(model: Architecture) -> Architecture:
    """Replace the head of the vocabulary by a head for one score."""
    own_head = model.vocab * model.hidden if model.embedding else 0
    return replace(model, total=model.total - own_head + model.hidden, vocab=1)


def _counted(model: Any, name: str) -> Architecture:
    config = model.config
    attention = _Attention.of(config, head_norms=any(".q_norm." in name for name, _ in model.named_parameters()))
    layers: dict[str, int] = {}
    experts: dict[str, int] = {}
    for parameter, weights in model.named_parameters():
        layer = layer_of(parameter)
        counts = experts if "experts" in parameter.split(".") else layers
        counts[layer] = counts.get(layer, 0) + weights.numel()
    decoder = {layer: count for layer, count in layers.items() if layer}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    hidden, num_experts = config.hidden_size, _num_experts(config) if experts else 0
    layer_experts = next(iter(experts.values()), 0)
    # A module is a layer like the last, two norms of its inputs, one before the head, and a projection of two widths.
    mtp = list(decoder.values())[-1] + layer_experts + 2 * hidden**2 + 3 * hidden
    return Architecture(
        name=name,
        family=config.model_type,
        total=sum(layers.values()) + sum(experts.values()),
        experts=sum(experts.values()),
        embedding=0 if head.weight is embedding.weight else embedding.weight.numel(),
        mtp=mtp * (getattr(config, "num_nextn_predict_layers", 0) or 0),
        num_layers=len(decoder),
        num_moe_layers=len(experts),
        num_experts=num_experts,
        experts_per_token=config.num_experts_per_tok if num_experts else 0,
        hidden=hidden,
        positions=config.max_position_embeddings,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        layer=max(decoder.values()),
        layer_experts=layer_experts,
        kv=attention.kv * len(decoder),
        kv_shards=attention.kv_shards,
        saved=sum(_saved(config, attention, moe=layer in experts, lean=False) for layer in decoder),
        saved_lean=sum(_saved(config, attention, moe=layer in experts, lean=True) for layer in decoder),
        attention_flops=attention.flops * len(decoder),
        decode_flops=attention.decode_flops * len(decoder),
    )


def meta_model(config_json: Path) -> Any:
    """Build the model of a config.json without its weights. Raises ValueError for an unknown `model_type`."""
    settings: dict[str, Any] = json.loads(config_json.read_text(encoding="utf-8"))
    if settings.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{config_json}: transformers does not know model_type '{settings.get('model_type')}'")
    settings.setdefault("vocab_size", len(byte_tokenizer()))  # a fresh model's vocabulary
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


def layer_of(name: str) -> str:
    """Return the prefix that names a tensor's decoder layer, or "" for a tensor outside of the layers."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")


def format_parameters(count: int) -> str:
    """Format a count, as in `1.9M parameters`."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name} parameters"
    return f"{count} parameters"


@dataclass(frozen=True, slots=True)
class _Attention:
    """One layer's attention, in elements and FLOPs of one token."""

    inputs: int
    """Elements that its projections save."""
    normed: int
    """Elements that its inner norms take."""
    scores: int
    """Elements that scaled dot products save: queries, keys, values, outputs and a sum for each head."""
    kv: int
    kv_shards: int
    flops: int
    decode_flops: int

    @classmethod
    def of(cls, config: PreTrainedConfig, *, head_norms: bool) -> "_Attention":
        heads: int = config.num_attention_heads
        latent: int | None = getattr(config, "kv_lora_rank", None)
        if latent is not None:
            rope, value = config.qk_rope_head_dim, config.v_head_dim
            key = config.qk_nope_head_dim + rope
            normed = (config.q_lora_rank or 0) + latent
            return cls(
                inputs=config.hidden_size + normed + heads * value,
                normed=normed,
                scores=4 * heads * key + heads,  # values are padded to the keys' width
                kv=latent + rope,
                kv_shards=1,
                flops=2 * heads * (key + value),
                decode_flops=2 * heads * (2 * latent + rope),
            )
        width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared: int = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            inputs=config.hidden_size + heads * width,
            normed=(heads + shared) * width if head_norms else 0,
            scores=2 * (heads + shared) * width + heads,
            kv=2 * shared * width,
            kv_shards=shared,
            flops=4 * heads * width,
            decode_flops=4 * heads * width,
        )


def _saved(config: PreTrainedConfig, attention: _Attention, *, moe: bool, lean: bool) -> int:
    """Return the elements of one token that autograd saves in one layer.

    lean: the project's own norms and experts (float32 on the CPU). Otherwise norms save a float32 copy beside their
    result, and experts save each token's rows.
    """
    width_D: int = config.hidden_size
    norm = 1 if lean else 3
    saved = 2 * norm * width_D + norm * attention.normed + attention.inputs + attention.scores
    if not moe:
        return saved + width_D + 4 * config.intermediate_size
    routed_K, width_I, num_E = config.num_experts_per_tok, config.moe_intermediate_size, _num_experts(config)
    shared_I = (getattr(config, "n_shared_experts", 0) or 0) * width_I
    router = width_D + 3 * num_E if lean else 2 * width_D + 7 * num_E
    experts = routed_K * (2 * width_I + 7) if lean else routed_K * (2 * width_D + 4 * width_I + 14)
    return saved + router + experts + 4 * shared_I + (0 if lean or not shared_I else width_D)


def _num_experts(config: PreTrainedConfig) -> int:
    return next(getattr(config, key) for key in ("n_routed_experts", "num_local_experts") if hasattr(config, key))
