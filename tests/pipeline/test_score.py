"""Reward models: one score of one text, whoever computes it; and what is refused as one."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GptOssConfig,
)

from pipeline.data.scored import scored_ids
from pipeline.judging.scorer import Scorer
from pipeline.models.score import refuse_other_scores
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.load import load_model
from pipeline.weights.reward_model import load_score_model, new_score_model
from rollout.checkpoint import is_reward_model
from tests.pipeline.small_models import FAMILIES, small_causal_lm, small_reward_model

TALKS = [
    [{"role": "user", "content": "2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A long question, is it not?"}],
    [*({"role": role, "content": "so"} for role in ("user", "assistant")), {"role": "user", "content": "and?"}],
]
ITEMS = [(talk, answer) for talk in TALKS for answer in ("4", "", "No, and here is why: it is not.", "<eos><pad>")]
BOUND = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A language model and a reward model on it."""
    home = tmp_path_factory.mktemp(request.param)
    causal_lm = small_causal_lm(request.param, home / "lm")
    return causal_lm, small_reward_model(causal_lm, home / "rm")


def of_transformers(folder: Path, batch_size: int, padding_side: str) -> list[float]:
    """Scores of ITEMS by `transformers` alone: its own class, attention and padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    ids = [list(chain(*scored_ids(*item, tokenizer))) for item in ITEMS]
    scores: list[float] = []
    for start in range(0, len(ids), batch_size):
        batch: Any = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, return_tensors="pt")
        with torch.no_grad():
            scores += model(**batch).logits[:, 0].tolist()
    return scores


def assert_close(scores: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=0, atol=BOUND)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_scorer_agrees_with_transformers_whatever_the_batch_and_padding(
    folders: tuple[Path, Path], padding_side: str
) -> None:
    scores = Scorer(folders[1], "float32", batch_tokens=4096).scores(ITEMS)
    assert len({round(score, 2) for score in scores}) > len(scores) / 2  # scores that differ, or the bound says nothing
    for batch_size in (1, 8):
        assert_close(of_transformers(folders[1], batch_size, padding_side), scores)


def test_a_score_does_not_depend_on_what_is_scored_with_it(folders: tuple[Path, Path]) -> None:
    scores = Scorer(folders[1], "float32", batch_tokens=4096).scores(ITEMS)
    small = Scorer(folders[1], "float32", batch_tokens=16)
    assert_close(small.scores(ITEMS), scores)
    assert_close(small.scores(ITEMS[::-1])[::-1], scores)
    assert_close([small.scores([item])[0] for item in ITEMS], scores)
    assert small.scores([]) == []
    twice = small.scores([ITEMS[0], ITEMS[0]])
    assert_close(twice, [scores[0]] * 2)


def test_only_the_head_is_new_and_the_seed_decides_it(folders: tuple[Path, Path]) -> None:
    causal_lm = load_model(folders[0], "float32").state_dict()
    first, again, other = (new_score_model(folders[0], "float32", seed) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        if name != "score.weight":
            assert torch.equal(tensor, causal_lm[name]), name
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    width = first.score.weight.shape[1]
    assert first.score.bias is None and 0.5 < first.score.weight.std().item() * width < 2


def test_a_checkpoint_says_what_it_is(folders: tuple[Path, Path]) -> None:
    causal_lm, reward_model = folders
    assert is_reward_model(reward_model) and not is_reward_model(causal_lm)
    config = json.loads((reward_model / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["pad_token_id"] not in (None, config["eos_token_id"])
    assert load_score_model(reward_model, "float32").config.num_labels == 1
    with pytest.raises(ValueError, match="is no reward model"):
        load_score_model(causal_lm, "float32")


def broken(folder: Path, out: Path, weights: dict[str, torch.Tensor | None], **settings: Any) -> Path:
    """A copy with tensors and settings changed; None leaves a tensor out."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors") | weights
    save_file({name: x for name, x in tensors.items() if x is not None}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (out / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(out)
    return out


def test_a_checkpoint_that_does_not_fit_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    causal_lm, reward_model = folders
    no_head = broken(reward_model, tmp_path / "no_head", {"score.weight": None})
    with pytest.raises(ValueError, match=r"missing_keys .*'score\.weight'"):
        load_score_model(no_head, "float32")
    width = load_score_model(reward_model, "float32").score.in_features
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    two = broken(reward_model, tmp_path / "two", {"score.weight": torch.ones(2, width)}, **labels)
    with pytest.raises(ValueError, match="one score"):
        load_score_model(two, "float32")
    lost = broken(causal_lm, tmp_path / "lost", {"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"missing_keys .*'model\.norm\.weight'"):
        new_score_model(lost, "float32", seed=0)


def test_a_model_that_attends_otherwise_is_refused() -> None:
    """GPT-OSS has attention sinks, which packed attention leaves out."""
    config = GptOssConfig(
        vocab_size=264, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, num_labels=1, pad_token_id=0,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ValueError, match="not supported"):
        refuse_other_scores(model)


def test_a_sound_model_is_not_refused(folders: tuple[Path, Path]) -> None:
    refuse_other_scores(load_score_model(folders[1], "float32"))
    refuse_other_scores(new_score_model(folders[0], "bfloat16", seed=0))
