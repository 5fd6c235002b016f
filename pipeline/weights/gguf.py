"""Import a Llama from a GGUF file as a plain checkpoint in float32.

`transformers` reads the weights. It skips unknown tensors and settings without an error, so files with any are refused
here. It also ignores pre-tokenizers that are not in its list, such as SmolLM's, which splits digits. So the tokenizer
is built here.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.weights.load import refuse_faults, save_hf

try:
    import accelerate as _  # noqa: F401  used by transformers' reader
    import gguf
except ImportError as error:
    raise ImportError("importing a GGUF file needs gguf and accelerate: pip install 'alignyard[gguf]'") from error

_LAYER_TENSORS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)
_REQUIRED = (
    *("llama.embedding_length", "llama.feed_forward_length", "llama.block_count", "llama.attention.head_count"),
    *("llama.context_length", "llama.attention.layer_norm_rms_epsilon"),
    *("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"),
    "tokenizer.ggml.eos_token_id",
)
"""Metadata that `transformers` would replace by a default if it were missing."""
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}


def import_gguf(file: str | Path, out: str | Path) -> Path:
    """Write the Llama of the GGUF `file` as a checkpoint folder `out`, and return `out`.

    Raises ValueError for an unreadable file, and for anything that would be lost: another architecture, a tensor or
    quantisation without counterpart, scaled or partial rotary embeddings, another kind of tokenizer.

    Example: `import_gguf("SmolLM2-135M-Instruct.Q8_0.gguf", "models/smollm2")`
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"no GGUF file '{file}'")
    try:
        reader = gguf.GGUFReader(file)
    except ValueError as error:
        raise ValueError(f"'{file}' is not a readable GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_losses(file, metadata, {tensor.name for tensor in reader.tensors})
    tokenizer = _tokenizer(metadata)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except (NotImplementedError, RuntimeError) as error:  # an unknown quantisation; a tensor of another shape
        raise ValueError(f"'{file}' can't be read by transformers ({error}); take a Q8_0 or F16 file") from error
    model, loading = loaded
    refuse_faults(file, loading)
    weights = {name: x for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}
    del model.config.quantization_config  # with it, transformers refuses to save the dequantised model
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    return save_hf(plain, tokenizer, Path(out), [weights])


def _refuse_losses(file: Path, metadata: dict[str, Any], tensors: set[str]) -> None:
    """Raise ValueError for metadata and tensors that `transformers`' reader would skip."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"'{file}' holds a '{architecture}' model; only the llama architecture can be imported")
    if missing := [key for key in _REQUIRED if key not in metadata]:
        raise ValueError(f"the GGUF file lacks '{missing[0]}'; convert the model again with a newer converter")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"scaled rotary embeddings ({scaling}) can't be imported")
    heads_width = metadata["llama.embedding_length"] // metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", heads_width)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("rotary embeddings over a part of the head can't be imported")
    layers = range(metadata["llama.block_count"])
    expected = {f"blk.{layer}.{name}.weight" for layer in layers for name in _LAYER_TENSORS}
    expected |= {"token_embd.weight", "output_norm.weight"} | {"output.weight"} & tensors  # absent if tied
    if tensors != expected:
        raise ValueError(f"'{file}': tensors missing or without counterpart: {sorted(tensors ^ expected)[:5]}")


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    kind, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer '{kind}' with pre-tokenizer '{pre}' can't be imported; "
            f"known is gpt2 with one of {sorted(_PRE_TOKENIZERS)}"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if token_type in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = token_type == gguf.TokenType.CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    special_tokens = {
        name: tokens[metadata[f"tokenizer.ggml.{role}_token_id"]]
        for role, name in roles.items()
        if f"tokenizer.ggml.{role}_token_id" in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = special_tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special_tokens)
