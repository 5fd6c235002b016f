"""What a reward model reads: the policy's own prompt, the answer's text, one end; and a pad that is none of them."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import ChatFormat
from pipeline.data.rows import BadRowError
from pipeline.data.scored import scored_ids, with_pad
from pipeline.models.tokenizer import byte_tokenizer

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
FORMS = {
    "qwen3_form": (["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama31_form": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "deepseek_v3_form": ([], "<eos>"),
    None: ([], "<eos>"),
}
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
]


def tokenizer_of(form: str | None) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer of the form, and the id that ends its turns."""
    tokenizer = byte_tokenizer()
    special_tokens, end = FORMS[form]
    if form is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
        tokenizer.chat_template = (TEMPLATES / f"{form}.jinja").read_text()
    return tokenizer, tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "answer", ["yes", " yes \n", "", "<eos>", "a<|im_end|>b<|eot_id|><|assistant|>c", "é\U0001f642"]
)
def test_the_prompt_is_the_policys_and_the_answer_its_text_and_one_end(form: str | None, answer: str) -> None:
    tokenizer, end = tokenizer_of(form)
    prompt_ids, answer_ids = scored_ids(TALK, answer, tokenizer)
    assert prompt_ids == ChatFormat(tokenizer).prompt_ids(TALK)
    assert answer_ids[-1] == end and answer_ids.count(end) == 1
    assert not set(answer_ids[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(answer_ids[:-1]) == answer


def test_what_training_sees_of_an_answer_is_what_the_policy_learned_to_say() -> None:
    tokenizer, _ = tokenizer_of(None)
    token_ids, loss_mask = ChatFormat(tokenizer).training_ids([*TALK, {"role": "assistant", "content": "yes"}])
    prompt_ids, answer_ids = scored_ids(TALK, "yes", tokenizer)
    assert prompt_ids + answer_ids == token_ids
    assert loss_mask[-len(answer_ids) :] == [1] * len(answer_ids)


def test_a_changed_template_is_seen() -> None:
    tokenizer, end = tokenizer_of(None)
    assert scored_ids(TALK, "yes", tokenizer)[1][-1] == end
    tokenizer.chat_template = str(tokenizer.chat_template).replace("eos_token", "'<|spare_0|>'")
    assert scored_ids(TALK, "yes", tokenizer)[1][-1] == tokenizer.convert_tokens_to_ids("<|spare_0|>")


def test_a_conversation_that_the_template_refuses_is_a_bad_row() -> None:
    with pytest.raises(BadRowError, match="chat template"):
        scored_ids([{"role": "tool", "content": "x"}], "yes", byte_tokenizer())


@pytest.mark.parametrize("pad", [None, "<eos>", "<|im_end|>"])
def test_a_pad_that_could_end_an_answer_gives_way(pad: str | None) -> None:
    tokenizer, end = tokenizer_of("qwen3_form")
    tokenizer.pad_token = pad
    changed = with_pad(tokenizer)
    assert changed is tokenizer and changed.pad_token == "<pad>"
    assert tokenizer.pad_token_id not in (end, tokenizer.eos_token_id)


def test_a_sound_pad_stays() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|spare_1|>"
    assert with_pad(tokenizer).pad_token == "<|spare_1|>"


def tokenizer_with(*special_tokens: str) -> PreTrainedTokenizerFast:
    """A few letters, and these special tokens; the last ends an answer."""
    letters = {letter: index for index, letter in enumerate("Helo wrd1234\n")}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special_tokens[-1], chat_template=template)


def test_the_beginning_of_a_text_pads_only_where_nothing_else_can() -> None:
    tokenizer = tokenizer_with("<bos>", "<tool>", "<eos>")
    tokenizer.bos_token = "<bos>"
    assert with_pad(tokenizer).pad_token == "<tool>"
    tokenizer = tokenizer_with("<bos>", "<eos>")
    tokenizer.bos_token = "<bos>"
    assert with_pad(tokenizer).pad_token == "<bos>"


def test_without_another_special_token_there_is_nothing_to_pad_with() -> None:
    with pytest.raises(ValueError, match="pad"):
        with_pad(tokenizer_with("<eos>"))
