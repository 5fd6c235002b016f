"""Tiny models with random weights, large enough that a wrong weight shows, and their results under `transformers`."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from configs.sampling import RolloutConfig
from pipeline.models.tokenizer import byte_tokenizer
from rollout.types import Group
from rollout.weights import Bucket, to_buckets

ROOT = Path(__file__).parents[2]
CONFIG = RolloutConfig(max_model_len=160, max_num_seqs=8, kv_cache_gib=0.125, threads=1)
PROMPTS = [[1, 3, *range(20 + 7 * i, 40 + 9 * i)] for i in range(4)]
Model = TypeVar("Model", bound=PreTrainedModel)

MEAN_BOUND, MAX_BOUND = 1e-5, 1e-4


YARN = {
    "type": "yarn", "factor": 10, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip
"""A window of 16 made tenfold, as DeepSeek's own config.json writes it."""


def yarn(seed: int) -> DeepseekV3ForCausalLM:
    return moe(seed, rope_scaling=dict(YARN), max_position_embeddings=160)


def moe(seed: int, **changes: object) -> DeepseekV3ForCausalLM:
    return _noisy(DeepseekV3ForCausalLM(DeepseekV3Config(**_settings("tiny") | changes)), seed)


def v2(seed: int) -> PreTrainedModel:
    return _noisy(AutoModelForCausalLM.from_config(DeepseekV2Config(**_settings("tiny_v2"))), seed)


def _settings(shipped: str) -> dict[str, object]:
    settings = json.loads((ROOT / "configs" / "models" / f"{shipped}.json").read_text())
    return settings | {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=264, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _noisy(LlamaForCausalLM(config), seed)


def taught(rows: list[tuple[list[int], list[int]]], batch_size: int) -> LlamaForCausalLM:
    """A Llama after one pass over `rows`, token ids with a mask of those that are learned."""
    model = llama(0).train()
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    learned = torch.tensor([mask + [0] * (longest - len(mask)) for _, mask in rows]) == 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        model(ids[batch], labels=torch.where(learned[batch], ids[batch], -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def buckets(tensors: dict[str, torch.Tensor]) -> list[Bucket]:
    return list(to_buckets(tensors.items(), 1))


def logprobs(model: PreTrainedModel, token_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[T - 1] log-probabilities of each token after the first."""
    ids_1T = torch.tensor([token_ids])
    with torch.no_grad():
        return (model(ids_1T).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0]


def greedy(model: PreTrainedModel, token_ids: list[int]) -> list[bool]:
    """[T - 1] whether each token after the first is the likeliest."""
    ids_1T = torch.tensor([token_ids])
    with torch.no_grad():
        return (model(ids_1T).logits[0, :-1].argmax(-1) == ids_1T[0, 1:]).tolist()


def tokens_per_expert(model: DeepseekV3ForCausalLM, layer: int) -> Counter[int]:
    """Number of tokens of PROMPTS for each expert of a layer that gets any."""
    seen: Counter[int] = Counter()
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_hook(
        lambda _module, arguments, _output: seen.update(arguments[1].view(-1).tolist())
    )
    for prompt in PROMPTS:
        model(torch.tensor([prompt]))
    handle.remove()
    return seen


def rollout_gap(model: PreTrainedModel, groups: list[Group]) -> tuple[float, float]:
    """Mean and maximum of |transformers - engine| over the sampled tokens."""
    gaps = [
        logprobs(model, group.prompt_ids + completion.token_ids)[-len(completion.token_ids) :]
        - torch.tensor(completion.logprobs)
        for group in groups
        for completion in group.completions
    ]
    return _gap(gaps)


def prompt_gap(model: PreTrainedModel, answers: list[list[float]]) -> tuple[float, float]:
    """Mean and maximum of |transformers - engine| over the tokens of PROMPTS."""
    gaps = [logprobs(model, prompt) - torch.tensor(own) for prompt, own in zip(PROMPTS, answers, strict=True)]
    return _gap(gaps)


def within_bounds(gap: tuple[float, float]) -> bool:
    return gap[0] <= MEAN_BOUND and gap[1] <= MAX_BOUND


def _gap(gaps: list[torch.Tensor]) -> tuple[float, float]:
    every = torch.cat(gaps).abs()
    return every.mean().item(), every.max().item()


def _noisy(model: Model, seed: int) -> Model:
    """Weights and buffers (the router's correction bias is one) drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    correction = (buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    with torch.no_grad():
        for tensor in chain(model.parameters(), correction):
            tensor.copy_(tensor.mean() + torch.randn(tensor.shape, generator=generator) * 0.04)
    return model.eval()
