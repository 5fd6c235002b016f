"""Chat templates: which tokens are the assistant's, token by token, on the forms that models use."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import ChatFormat, turn_ends
from pipeline.data.rows import BadRowError
from pipeline.models.tokenizer import byte_tokenizer

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
SPECIAL_TOKENS = {
    "qwen3_form": ["<|im_start|>", "<|im_end|>"],
    "llama31_form": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "deepseek_v3_form": [],
}
QUESTION = {"role": "user", "content": "2+2?\n"}
THOUGHT = {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}
DOUBT = {"role": "user", "content": "sure?"}
YES = {"role": "assistant", "content": "\u00e9, yes \U0001f642"}
SYSTEM = {"role": "system", "content": "Be brief."}


def tokenizer_with(template: str, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    tokenizer.chat_template = template
    return tokenizer


def chat_of(form: str) -> tuple[ChatFormat, PreTrainedTokenizerFast]:
    tokenizer = tokenizer_with((TEMPLATES / f"{form}.jinja").read_text(), SPECIAL_TOKENS[form])
    return ChatFormat(tokenizer), tokenizer


def shown(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], loss_mask: list[int]) -> str:
    """The text with what is learned in brackets, put together token by token."""
    assert len(token_ids) == len(loss_mask)
    pieces: list[str] = []
    run: list[int] = []
    for place, learned in enumerate(loss_mask):
        run.append(token_ids[place])
        if place + 1 == len(loss_mask) or loss_mask[place + 1] != learned:
            pieces.append(f"[{tokenizer.decode(run)}]" if learned else tokenizer.decode(run))
            run = []
    return "".join(pieces)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "qwen3_form",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?\n<|im_end|>\n<|im_start|>assistant\n"
            "[4<|im_end|>]\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
            "[<think>\n\n</think>\n\n\u00e9, yes \U0001f642<|im_end|>]\n",
        ),
        (
            "llama31_form",
            "<bos><|start_header_id|>system<|end_header_id|>\n\nKnowledge until: 2023\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "[<think>\neasy\n</think>\n\n4<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nsure?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[\u00e9, yes \U0001f642<|eot_id|>]",
        ),
        (
            "deepseek_v3_form",
            "<bos>Be brief.<|User|>2+2?\n<|Assistant|>[<think>\neasy\n</think>\n\n4<eos>]"
            "<|User|>sure?<|Assistant|>[\u00e9, yes \U0001f642<eos>]",
        ),
    ],
)
def test_forms_of_real_templates(form: str, expected: str) -> None:
    chat, tokenizer = chat_of(form)
    messages = [SYSTEM, QUESTION, THOUGHT, DOUBT, YES]
    assert shown(tokenizer, *chat.training_ids(messages, reasoning="template")) == expected


def test_thinking_of_the_last_answer_is_learned() -> None:
    chat, tokenizer = chat_of("qwen3_form")
    text = shown(tokenizer, *chat.training_ids([QUESTION, THOUGHT]))
    assert text.endswith("<|im_start|>assistant\n[<think>\neasy\n</think>\n\n4<|im_end|>]\n")


def test_byte_template_token_by_token() -> None:
    chat = ChatFormat(byte_tokenizer())
    user, assistant = {"role": "user", "content": "\u00e9"}, {"role": "assistant", "content": "a\u00e9"}
    token_ids, loss_mask = chat.training_ids([user, assistant, user, assistant])
    turn_ids = [3, 8 + 0xC3, 8 + 0xA9, 4, 8 + ord("a"), 8 + 0xC3, 8 + 0xA9, 2]
    assert token_ids == [1, *turn_ids, *turn_ids]
    assert loss_mask == [0, *[0, 0, 0, 0, 1, 1, 1, 1] * 2]


@pytest.mark.parametrize("form", [*SPECIAL_TOKENS, "bytes"])
def test_an_answer_follows_exactly_its_prompt(form: str) -> None:
    chat = ChatFormat(byte_tokenizer()) if form == "bytes" else chat_of(form)[0]
    messages = [SYSTEM, QUESTION, THOUGHT, DOUBT, YES]
    token_ids, loss_mask = chat.training_ids(messages, reasoning="template")
    prompt_ids = chat.prompt_ids(messages[:-1])
    assert token_ids[: len(prompt_ids)] == prompt_ids
    assert loss_mask[len(prompt_ids) - 1 : len(prompt_ids) + 1] == [0, 1]


def test_nothing_is_merged_across_the_start_of_an_answer() -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: index for index, token in enumerate(["<end>", "<user>", *sorted(letters), "\u010a\u010a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("\u010a", "\u010a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<user>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else 'A\n' }}{{ m.content }}"
        "{{ '<end>' if m.role == 'assistant' }}{% endfor %}{{ 'A\n' if add_generation_prompt }}"
    )
    chat = ChatFormat(tokenizer)
    token_ids, loss_mask = chat.training_ids([DOUBT, {"role": "assistant", "content": "\nno"}])
    assert vocabulary["\u010a\u010a"] in tokenizer("A\n\nno")["input_ids"], "as a whole, the line ends would merge"
    learned = [token_id for token_id, mask in zip(token_ids, loss_mask, strict=True) if mask]
    assert tokenizer.convert_ids_to_tokens(learned) == ["\u010a", "n", "o", "<end>"]
    assert token_ids[: -len(learned)] == chat.prompt_ids([DOUBT])


@pytest.mark.parametrize(
    "template",
    [
        # no generation prompt: an answer can't be told from its header
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        # nothing ends an answer
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}",
        # the answer is not rendered
        "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' if m.role == 'user' }}{% endfor %}",
        # the prompt opens a thought, and thoughts are cut out of the whole conversation
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}",
    ],
)
def test_template_whose_answers_cannot_be_located_is_refused(template: str) -> None:
    chat = ChatFormat(tokenizer_with(template, SPECIAL_TOKENS["qwen3_form"]))
    with pytest.raises(ValueError, match=r"put \{% generation %\}"):
        chat.training_ids([QUESTION, YES])


@pytest.mark.parametrize("key", [None, "reasoning_content"])
def test_a_prompt_that_opens_a_thought_takes_answers_that_have_one(key: str | None) -> None:
    start = "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' if m.reasoning_content }}" if key else ""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}" + start + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"
    )
    tokenizer = tokenizer_with(template, SPECIAL_TOKENS["qwen3_form"])
    chat = ChatFormat(tokenizer)
    thought = {"role": "assistant", "content": "4", "reasoning_content": "easy"} if key else THOUGHT
    text = shown(tokenizer, *chat.training_ids([QUESTION, thought]))
    assert text.endswith("<|im_start|>assistant\n<think>\n[easy\n</think>\n\n4<|im_end|>]\n")
    with pytest.raises(BadRowError, match=r"put \{% generation %\}"):
        chat.training_ids([QUESTION, YES])


def test_marked_template_without_a_stop_is_refused() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    with pytest.raises(ValueError, match="learn to stop"):
        ChatFormat(tokenizer_with(template, [])).training_ids([QUESTION, YES])


HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
TAIL = (
    "{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"


def learned(template: str, messages: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """What is learned of each answer, and the doubts that were told."""
    tokenizer = tokenizer_with(template, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    doubts: list[str] = []
    chat = ChatFormat(tokenizer)
    token_ids, mask = chat.training_ids(messages, doubt=lambda reason, detail: doubts.append(f"{reason}: {detail}"))
    text = shown(tokenizer, token_ids, mask)
    return [piece.split("]")[0] for piece in text.split("[")[1:]], doubts


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        (OPEN + "{{ m.content }}{{ '<|im_end|>' }}" + CLOSE, ["Yes.<|im_end|>"]),
        (OPEN + "{{ m.content }}" + CLOSE + OPEN + "{{ '<|im_end|>' }}" + CLOSE, ["Yes.<|im_end|>"]),
        (
            OPEN + "{{ m.content[:2] }}" + CLOSE + OPEN + "{{ m.content[2:] + '<|im_end|>\n' }}" + CLOSE,
            ["Yes.<|im_end|>"],
        ),
        (OPEN + CLOSE + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE + OPEN + CLOSE, ["Yes.<|im_end|>"]),
        (
            OPEN + "{{ '<think>hm</think>' }}" + CLOSE + "{{ '\n' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE,
            ["<think>hm</think>", "Yes.<|im_end|>"],
        ),
        (
            OPEN + "{{ '<think>hm' }}" + CLOSE + "{{ '</think>' }}" + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE,
            ["<think>hm", "Yes.<|im_end|>"],
        ),
    ],
)
def test_blocks_of_one_answer(answer: str, pieces: list[str]) -> None:
    said = {"role": "assistant", "content": "Yes."}
    assert learned(HEAD + answer + TAIL, [DOUBT, said]) == (pieces, [])
    assert learned(HEAD + answer + TAIL, [DOUBT, said, DOUBT, said]) == (pieces * 2, [])


@pytest.mark.parametrize(
    "answer",
    [
        OPEN + "{{ m.content }}" + CLOSE + "{{ '<|im_end|>' }}",
        OPEN + "{{ m.content }}" + CLOSE + OPEN + "{{ '' }}" + CLOSE + "{{ '<|im_end|>' }}",
        OPEN + "{{ m.content + '<|im_end|> over' }}" + CLOSE,
        OPEN + "{{ '<think>hm</think>' + m.content }}" + CLOSE + "{{ '<|im_end|>' }}",
    ],
)
def test_blocks_that_teach_no_end_are_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="would not learn to stop"):
        learned(HEAD + answer + TAIL, [DOUBT, YES])


def test_what_the_prompt_holds_is_not_learned() -> None:
    header_inside = "{% for m in messages %}{% if m.role == 'assistant' %}" + OPEN + (
        "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}" + CLOSE + "{{ '\n' }}"
    ) + TAIL.replace("{{ '\n' }}{% else %}{{ m", "{% else %}{{ '<|im_start|>user\n' + m")  # fmt: skip
    said = {"role": "assistant", "content": "Yes."}
    assert learned(header_inside, [DOUBT, said, DOUBT, said]) == (["Yes.<|im_end|>"] * 2, [])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("add_generation_prompt }}", "add_generation_prompt }}{{ '<think>\n' if add_generation_prompt }}"), "<think>"),
        (("{% generation %}", "{{ '<think></think>' }}{% generation %}"), "put it into the {% generation %} block"),
        (("{% for m", "{{ messages | length }}{% for m"), "an answer follows other text than the prompt"),
    ],
)
def test_an_answer_that_no_rollout_could_give_is_told(change: tuple[str, str], told: str) -> None:
    template = HEAD + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE + TAIL
    said = {"role": "assistant", "content": "Yes."}
    assert learned(template, [DOUBT, said]) == (["Yes.<|im_end|>"], [])
    pieces, (doubt,) = learned(template.replace(*change), [DOUBT, said])
    assert (pieces, told in doubt) == (["Yes.<|im_end|>"], True)


def test_answers_that_the_template_does_not_mark_are_told() -> None:
    block = OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE
    only_last = HEAD + "{% if loop.last %}" + block + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}" + TAIL
    no, yes = {"role": "assistant", "content": "No."}, {"role": "assistant", "content": "Yes."}
    pieces, (doubt,) = learned(only_last, [DOUBT, no, DOUBT, yes])
    assert (pieces, doubt) == (["Yes.<|im_end|>"], "answer outside {% generation %}: it is not learned")
    assert learned(only_last, [DOUBT, no | {"weight": 0}, DOUBT, yes]) == (["Yes.<|im_end|>"], [])


def test_thinking_tokens_do_not_end_an_answer() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    template = plain + "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    thought = {"role": "assistant", "content": "<think>hm</think>Yes."}
    assert learned(template, [DOUBT, thought, DOUBT, thought]) == (["<think>hm</think>Yes.<|im_end|>"] * 2, [])


def test_one_row_that_a_template_can_not_take_is_a_bad_row() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content.rstrip('.') }}<|im_end|>\n{% endfor %}"
    template += "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    assert learned(template, [DOUBT, {"role": "assistant", "content": "Yes"}]) == (["Yes<|im_end|>"], [])
    with pytest.raises(BadRowError, match="assistant message that the chat template changes"):
        learned(template, [DOUBT, {"role": "assistant", "content": "Yes..."}])


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (HEAD + OPEN + "{{ m.content + '<|im_end|>' }}" + CLOSE + TAIL, ["<|im_end|>"]),
        (HEAD + "{{ m.content + '<|im_end|>' }}" + TAIL, ["<|im_end|>"]),
        (HEAD + "{{ '<think></think>' + m.content + '<|im_end|>' }}" + TAIL, ["<|im_end|>"]),
        (HEAD + "{{ m.content + eos_token }}" + TAIL, ["<eos>"]),
        (HEAD + OPEN + "{{ m.content + '<|im_end|>' + eos_token }}" + CLOSE + TAIL, ["<eos>", "<|im_end|>"]),
        # no template to train with, since its prompt opens a thought, but a turn has its end
        (HEAD + "{{ m.content + '<|im_end|>' }}" + TAIL.replace("assistant\n'", "assistant\n<think>'"), ["<|im_end|>"]),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", []),
        (
            HEAD + OPEN + "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
            "{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}" + CLOSE + TAIL,
            ["<|im_end|>", "<|call|>"],
        ),
    ],
)  # fmt: skip
def test_tokens_that_end_a_turn(template: str, ends: list[str]) -> None:
    tokenizer = tokenizer_with(template, ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|call|>"])
    assert tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).end_ids()) == ends
    assert turn_ends(tokenizer) == ChatFormat(tokenizer).end_ids()


def test_a_tokenizer_without_turns_has_no_ends_of_them() -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    assert turn_ends(bare) == []


def test_tokenizers_that_cannot_be_used() -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"set model\.chat_template"):
        ChatFormat(bare)
    backend = byte_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="x")
    with pytest.raises(ValueError, match="at its start"):
        ChatFormat(spaced)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("2+2", "not a list of {role, content}"),
        ([{"from": "human", "value": "hi"}], "does not end with the assistant"),
        ([{"role": "user", "content": ["hi"]}], "content part that is no text"),
        ([], "roles don't alternate"),
        ([SYSTEM], "roles don't alternate"),
        ([QUESTION, QUESTION, YES], "roles don't alternate"),
        ([YES, QUESTION, YES], "roles don't alternate"),
        ([QUESTION, {"role": "tool", "content": "4"}, YES], "roles don't alternate"),
        ([QUESTION, YES, SYSTEM], "roles don't alternate"),
        ([QUESTION], "does not end with the assistant"),
        ([QUESTION, {"role": "assistant", "content": " \n"}], "empty assistant message"),
        ([{"role": "user", "content": ""}, YES], "empty user message"),
        ([{"role": "user", "content": "hi<eos><|user|>"}, YES], "special token in the text"),
    ],
)
def test_bad_conversations(messages: object, reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        ChatFormat(byte_tokenizer()).check(messages, last_role="assistant")
    assert caught.value.reason == reason


def test_template_may_refuse_a_conversation() -> None:
    template = "{{ raise_exception('no system here') if messages[0].role == 'system' else 'x' }}"
    with pytest.raises(BadRowError, match="chat template: no system here"):
        ChatFormat(tokenizer_with(template, [])).prompt_ids([SYSTEM, QUESTION])
