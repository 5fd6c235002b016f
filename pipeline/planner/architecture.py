"""What a model is made of: parameters, saved activations, KV cache and FLOPs, counted on its `transformers` class.

The model is built on the meta device, where weights have shapes and no bytes; what is counted is what would be trained.

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
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.architecture import architecture_file

HUB = {
    "deepseek-ai/DeepSeek-V2": "deepseek_v2",
    "deepseek-ai/DeepSeek-V2-Chat": "deepseek_v2",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek_v2_lite",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek_v2_lite",
    "deepseek-ai/DeepSeek-V3": "deepseek_v3",
    "deepseek-ai/DeepSeek-V3-Base": "deepseek_v3",
    "deepseek-ai/DeepSeek-V3-0324": "deepseek_v3",
    "deepseek-ai/DeepSeek-R1": "deepseek_v3",
    "Qwen/Qwen3-30B-A3B": "qwen3_30b_a3b",
    "Qwen/Qwen3-235B-A22B": "qwen3_235b_a22b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2_135m",
}
"""Models on the hub whose architecture is shipped: nothing is fetched to plan with them."""
PUBLISHED = Path(configs.__file__).parent / "models" / "published"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model in numbers. Parameters leave the multi-token-prediction modules out; `mtp` counts them apart."""

    name: str
    family: str
    """Its `model_type`."""
    total: int
    experts: int
    """Parameters of the routed experts, all layers."""
    embedding: int
    """Parameters of the input embedding, of which a token reads one row; 0 where it is also the head."""
    mtp: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    hidden: int
    vocab: int
    heads: int
    layer: int
    """Parameters of the largest decoder layer without its routed experts."""
    layer_experts: int
    """Parameters of the routed experts of one layer."""
    kv: int
    """Elements of KV cache that a token leaves, all layers: of MLA the latent and its rotary key."""
    kv_shards: int
    """Into how many parts tensor parallelism can cut the KV cache; MLA's latent is whole on every device."""
    saved: int
    """Elements that autograd keeps of a token for the backward pass, all layers, in bfloat16 on a GPU."""
    saved_lean: int
    """The same in float32 on the CPU, where experts and norms are our own."""
    attention_flops: int
    """FLOPs of a forward pass for each position that a token attends to, all layers, as training computes them."""
    decode_flops: int
    """The same while decoding, where MLA works on the latent."""

    @property
    def active(self) -> int:
        """Parameters that a token meets: all but the experts it isn't sent to, and the embedding, which is read."""
        unused = self.experts * (self.num_experts - self.experts_per_token) // self.num_experts if self.experts else 0
        return self.total - unused - self.embedding

    @property
    def dense(self) -> int:
        """Parameters outside of the routed experts."""
        return self.total - self.experts


def architecture_of(model: str) -> Architecture:
    """The architecture of a checkpoint's folder, of a hub name in HUB, of a config.json (a name that ends in .json), or
    of a shipped `init_config`.

    Raises ValueError with the remedy where it isn't known, or is none that `transformers` knows.
    """
    if model in HUB:
        return read_architecture(PUBLISHED / f"{HUB[model]}.json")
    file = Path(model).expanduser() / "config.json"
    if file.is_file():
        return read_architecture(file)
    if "/" in model and not model.endswith(".json"):
        raise ValueError(
            f"model '{model}': its architecture is not shipped, and nothing is fetched to plan; give its config.json "
            f"by --model-config FILE. Shipped: {', '.join(HUB)}"
        )
    return read_architecture(architecture_file(model))


@cache
def read_architecture(config_json: Path) -> Architecture:
    """Counts the model that a `transformers` config.json describes. Raises ValueError where it isn't one, or one of
    another form than the planner knows."""
    model = meta_model(config_json)
    try:
        return _counted(model, config_json.stem if config_json.stem != "config" else config_json.parent.name)
    except (AttributeError, TypeError, StopIteration, IndexError) as error:
        raise ValueError(f"{config_json}: the planner can't count a {type(model).__name__} ({error})") from error


def as_reward_model(model: Architecture) -> Architecture:
    """The same with a head of one number in the place of that of the vocabulary."""
    own_head = model.vocab * model.hidden if model.embedding else 0
    return replace(model, total=model.total - own_head + model.hidden, vocab=1)


def _counted(model: Any, name: str) -> Architecture:
    config = model.config
    attention = _Attention.of(config, head_norms=any(".q_norm." in name for name, _ in model.named_parameters()))
    layers: dict[str, int] = {}
    experts: dict[str, int] = {}
    for name, weights in model.named_parameters():
        layer = layer_of(name)
        kind = experts if "experts" in name.split(".") else layers
        kind[layer] = kind.get(layer, 0) + weights.numel()
    decoder = {layer: count for layer, count in layers.items() if layer}
    num_layers = len(decoder)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    hidden, num_experts = config.hidden_size, _experts_of(config) if experts else 0
    own = next(iter(experts.values()), 0)
    # A module is a layer like the last, two norms of its inputs and one before the head, and what joins two widths.
    mtp = (list(decoder.values())[-1] + own + 2 * hidden**2 + 3 * hidden) if decoder else 0
    return Architecture(
        name=name,
        family=config.model_type,
        total=sum(layers.values()) + sum(experts.values()),
        experts=sum(experts.values()),
        embedding=0 if tied else embedding.weight.numel(),
        mtp=mtp * (getattr(config, "num_nextn_predict_layers", 0) or 0),
        num_layers=num_layers,
        num_moe_layers=len(experts),
        num_experts=num_experts,
        experts_per_token=config.num_experts_per_tok if num_experts else 0,
        hidden=hidden,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        layer=max(decoder.values()),
        layer_experts=own,
        kv=attention.kv * num_layers,
        kv_shards=attention.kv_shards,
        saved=sum(_saved(config, attention, moe=layer in experts, lean=False) for layer in decoder),
        saved_lean=sum(_saved(config, attention, moe=layer in experts, lean=True) for layer in decoder),
        attention_flops=attention.flops * num_layers,
        decode_flops=attention.decode_flops * num_layers,
    )


def meta_model(config_json: Path) -> Any:
    """The model of a config.json without its weights. Raises ValueError where `transformers` knows no such model."""
    settings: dict[str, Any] = json.loads(config_json.read_text(encoding="utf-8"))
    if settings.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{config_json}: model_type '{settings.get('model_type')}' is none that transformers knows")
    settings.setdefault("vocab_size", len(byte_tokenizer()))  # as a fresh model's is
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))


def layer_of(name: str) -> str:
    """The decoder layer that a tensor belongs to, as its name begins; empty for what is in none."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")


def told_parameters(count: int) -> str:
    """`1.9M parameters`."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name} parameters"
    return f"{count} parameters"


@dataclass(frozen=True, slots=True)
class _Attention:
    """One layer's attention, in elements and FLOPs of one token."""

    inputs: int
    """Elements that its projections keep."""
    normed: int
    """Elements that its inner norms take."""
    scores: int
    """Elements that scaled dot products keep: queries, keys, values, outputs and a sum for each head."""
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
    """Elements that autograd keeps of one token in one layer. `lean`: our own norms and experts (float32, CPU); else
    norms keep a float32 copy beside their result, and the experts each token's rows."""
    width_D: int = config.hidden_size
    norm = 1 if lean else 3
    saved = 2 * norm * width_D + norm * attention.normed + attention.inputs + attention.scores
    if not moe:
        return saved + width_D + 4 * config.intermediate_size
    routed_K, width_I, num_E = config.num_experts_per_tok, config.moe_intermediate_size, _experts_of(config)
    shared_I = (getattr(config, "n_shared_experts", 0) or 0) * width_I
    router = width_D + 3 * num_E if lean else 2 * width_D + 7 * num_E
    experts = routed_K * (2 * width_I + 7) if lean else routed_K * (2 * width_D + 4 * width_I + 14)
    return saved + router + experts + 4 * shared_I + (0 if lean or not shared_I else width_D)


def _experts_of(config: PreTrainedConfig) -> int:
    return next(getattr(config, key) for key in ("n_routed_experts", "num_local_experts") if hasattr(config, key))
