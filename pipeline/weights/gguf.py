"""A GGUF file of a Llama becomes a plain checkpoint: weights dequantised to float32, tokenizer and chat template kept.

GGUF stores the rows of a head's query and key weights pairwise (x0 y0 x1 y1 ...), the layout of its own rotary
embedding; `transformers` wants halves (x0 x1 ... y0 y1 ...). Everything else is a matter of names.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.weights.load import save_hf

try:
    import gguf
except ImportError as error:
    raise ImportError("importing a GGUF file needs the package gguf: pip install 'alignyard[gguf]'") from error

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}


def import_gguf(file: str | Path, out: str | Path) -> Path:
    """Writes the Llama of the GGUF `file` as a checkpoint folder `out`, and returns `out`.

    Raises ValueError for a file that is no GGUF or holds anything that would be lost: another architecture, a tensor
    or a quantisation without counterpart, scaled rotary embeddings, a tokenizer of another kind.
    """
    if not Path(file).is_file():
        raise ValueError(f"no GGUF file '{file}'")
    try:
        reader = gguf.GGUFReader(file)
    except ValueError as error:
        raise ValueError(f"'{file}' is not a readable GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"'{file}' holds a '{architecture}' model; only the llama architecture can be imported")
    config = _config(metadata, reader.tensors)
    tokenizer = _tokenizer(metadata)
    with torch.device("meta"):  # only the names and shapes are of interest
        model = LlamaForCausalLM(config)
    state_dict = _state_dict(reader.tensors, config)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: weight.shape for name, weight in state_dict.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"'{file}': tensors missing or of another shape than its metadata says: {differing[:5]}")
    return save_hf(model, tokenizer, Path(out), [state_dict])


def _needed(metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"the GGUF file lacks '{key}'; convert the model again with a newer converter")
    return metadata[key]


def _config(metadata: dict[str, Any], tensors: list[gguf.ReaderTensor]) -> LlamaConfig:
    if "llama.rope.scaling.type" in metadata and metadata["llama.rope.scaling.type"] != "none":
        raise ValueError(f"scaled rotary embeddings ({metadata['llama.rope.scaling.type']}) can't be imported")
    hidden_size = _needed(metadata, "llama.embedding_length")
    num_heads = _needed(metadata, "llama.attention.head_count")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // num_heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("rotary embeddings over a part of the head can't be imported")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return LlamaConfig(
        vocab_size=len(_needed(metadata, "tokenizer.ggml.tokens")),
        hidden_size=hidden_size,
        intermediate_size=_needed(metadata, "llama.feed_forward_length"),
        num_hidden_layers=_needed(metadata, "llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=_needed(metadata, "llama.context_length"),
        rms_norm_eps=_needed(metadata, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_needed(metadata, "tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _state_dict(tensors: list[gguf.ReaderTensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the file in float32, under its `transformers` name."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state_dict: dict[str, torch.Tensor] = {}
    for tensor in track(tensors, description="dequantise", transient=True):
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{tensor.name}: {tensor.tensor_type.name} can't be dequantised; use Q8_0 or F16"
            ) from error
        name, kind = _name(tensor.name)
        if kind in heads:
            weight = _halves(weight, heads[kind])
        state_dict[name] = torch.tensor(weight)  # a copy: the file's own memory is read-only
    return state_dict


def _name(gguf_name: str) -> tuple[str, str]:
    """("model.layers.3.self_attn.q_proj.weight", "attn_q") of "blk.3.attn_q.weight"."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if layer and layer[2] in LAYER_TENSOR_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_TENSOR_NAMES[layer[2]]}.weight", layer[2]
    kind = gguf_name.removesuffix(".weight")
    if kind not in TENSOR_NAMES:
        raise ValueError(f"tensor '{gguf_name}' has no counterpart in a plain Llama; this model can't be imported")
    return f"{TENSOR_NAMES[kind]}.weight", kind


def _halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """[num_heads * head_dim, in] with pairwise rows -> the same rows in halves, head by head."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    kind, pre = _needed(metadata, "tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer '{kind}' with pre-tokenizer '{pre}' can't be imported; "
            f"known is gpt2 with one of {sorted(PRE_TOKENIZERS)}"
        )
    tokens = _needed(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _needed(metadata, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, _needed(metadata, "tokenizer.ggml.token_type"), strict=True):
        if token_type in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = token_type == gguf.TokenType.CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    named = {
        name: tokens[metadata[f"tokenizer.ggml.{role}_token_id"]]
        for role, name in roles.items()
        if f"tokenizer.ggml.{role}_token_id" in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)
