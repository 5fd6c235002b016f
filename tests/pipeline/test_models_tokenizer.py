"""Tokenizers: what goes in comes out, and one that loses text is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from configs.model import ModelConfig
from pipeline.models.tokenizer import ROUND_TRIP_PROBE, byte_tokenizer, load_tokenizer
from pipeline.weights.resolve import check_template

CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "\u00e9"},
]


def test_every_byte_has_its_id_in_order() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(128))) + "\u00e9\u4e2d\U0001f642"
    assert tokenizer(text)["input_ids"] == [8 + byte for byte in text.encode()]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 264
    assert len(tokenizer) % 8 == 0


def test_special_tokens_and_template() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos><|system|>s<|user|>q<|assistant|>a<eos><|user|>\u00e9<|assistant|>"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids == [1, 5, 8 + 115, 3, 8 + 113, 4, 8 + 97, 2, 3, 8 + 0xC3, 8 + 0xA9, 4]


def test_saved_tokenizer_reloads_the_same(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert again.chat_template == tokenizer.chat_template
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.decode(again(ROUND_TRIP_PROBE)["input_ids"]) == ROUND_TRIP_PROBE


def test_lossy_tokenizer_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Hello": 1, "world": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"loses text.*'Hello world.*another tokenizer"):
        load_tokenizer(tmp_path)


def test_a_class_that_would_read_the_file_otherwise_is_not_asked(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    ids = byte_tokenizer()(ROUND_TRIP_PROBE)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(ROUND_TRIP_PROBE)["input_ids"] != ids
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(ROUND_TRIP_PROBE)["input_ids"] == ids
    tokenizer.save_pretrained(tmp_path)  # what is exported says how it is to be read
    assert AutoTokenizer.from_pretrained(tmp_path)(ROUND_TRIP_PROBE)["input_ids"] == ids


def test_chat_template_is_replaced(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path, str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    with pytest.raises(ValueError, match=r"chat_template='nowhere\.jinja'"):
        load_tokenizer(tmp_path, "nowhere.jinja")


def test_a_shipped_template_is_found_by_name_and_a_file_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert "<|im_start|>" in str(load_tokenizer(tmp_path, "chatml").chat_template)
    check_template(ModelConfig(path="x", chat_template="chatml"))
    with pytest.raises(ValueError, match=r"model\.chat_template='chat_ml'.*: chatml, "):
        check_template(ModelConfig(path="x", chat_template="chat_ml"))
    monkeypatch.chdir(tmp_path)
    Path("chatml").write_text("mine")
    assert load_tokenizer(tmp_path, "chatml").chat_template == "mine"


@pytest.mark.parametrize(
    ("described", "added", "refused"),
    [
        ({"vocab_size": 264}, [], None),
        ({"vocab_size": 300}, ["<|im_start|>"], None),
        ({"vocab_size": 263}, [], "1 tokens beyond"),
        ({"vocab_size": 264}, ["<|im_start|>", "<|im_end|>"], r"2 tokens beyond .*<\|im_end\|>, <\|im_start\|>"),
        ({"text_config": {"vocab_size": 264}}, ["<think>"], "resize_token_embeddings"),
        ({"vocab_size": 264}, ["<image_soft_token>"], None),
        ({"model_type": "llama"}, ["<think>"], None),
    ],
)
def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tmp_path: Path, described: dict[str, Any], added: list[str], refused: str | None
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described))
    if refused is None:
        assert len(load_tokenizer(tmp_path)) == 264 + len(added)
        return
    with pytest.raises(ValueError, match=refused):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
