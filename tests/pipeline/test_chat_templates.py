"""The shipped chat templates: each on one turn and several, with a system message, thinking and tools where its format
has them. What is learned is the answers with their ends, and each follows the prompt of a rollout."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import configs
from pipeline.data.chat import ChatFormat
from pipeline.data.rows import BadRowError
from pipeline.data.template_files import template_file
from pipeline.models.tokenizer import byte_tokenizer

SHIPPED = sorted(file.stem for file in (Path(configs.__file__).parent / "templates").glob("*.jinja"))


@dataclass(frozen=True)
class Family:
    """What a model's tokenizer calls special, and what its template can render."""

    special: str
    bos: str
    eos: str
    end: str
    call_end: str = ""
    thinks: bool = False
    calls: bool = False
    lists_tools: bool = False
    history_learned: bool = True
    before: str = ""
    after: str = ""
    """What the template puts around an answer without reasoning that is learned with it."""


CHATML = "<|im_start|> <|im_end|> <|endoftext|>"
BAR = "\uff5c"
DEEPSEEK = f"<{BAR}begin▁of▁sentence{BAR}>", f"<{BAR}end▁of▁sentence{BAR}>"
DEEPSEEK_SPECIAL = " ".join(
    [f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>", f"<{BAR}tool▁sep{BAR}>", *DEEPSEEK]
    + [f"<{BAR}tool▁{part}▁{at}{BAR}>" for part in ("calls", "call", "outputs", "output") for at in ("begin", "end")]
)
LLAMA = "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>"
EMPTY = "<think>\n\n</think>\n"
FAMILIES = {
    "chatml": Family(CHATML, "", "<|endoftext|>", "<|im_end|>"),
    "qwen2_5": Family(CHATML, "", "<|endoftext|>", "<|im_end|>", calls=True, lists_tools=True),
    "qwen3": Family(CHATML, "", "<|im_end|>", "<|im_end|>", thinks=True, calls=True, lists_tools=True),
    "smollm3": Family(CHATML, "", "<|im_end|>", "<|im_end|>", thinks=True, calls=True, lists_tools=True, before=EMPTY),
    "llama3": Family(LLAMA, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama3_1": Family(LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", calls=True, lists_tools=True),
    "mistral": Family("<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]", "<s>", "</s>", "</s>"),
    "gemma": Family("<bos> <eos> <start_of_turn> <end_of_turn>", "<bos>", "<eos>", "<end_of_turn>"),
    "phi3": Family("<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>", "", "<|endoftext|>", "<|end|>"),
    "phi4": Family("<|im_sep|> " + CHATML, "", "<|im_end|>", "<|im_end|>"),
    "olmo2": Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "glm4": Family(
        "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>", "", "<|endoftext|>",
        "<|user|>", call_end="<|observation|>", calls=True, lists_tools=True, before="\n",
    ),
    "deepseek_v2": Family(" ".join(DEEPSEEK), *DEEPSEEK, DEEPSEEK[1], before=" "),
    "deepseek_v3": Family(DEEPSEEK_SPECIAL, *DEEPSEEK, DEEPSEEK[1], calls=True),
    "deepseek_r1": Family(
        DEEPSEEK_SPECIAL, *DEEPSEEK, DEEPSEEK[1], thinks=True, history_learned=False, before="\n</think>\n\n"
    ),
    "gpt_oss": Family(
        "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|endoftext|>", "", "<|return|>", "<|return|>",
        thinks=True, history_learned=False, before="<|channel|>final<|message|>",
    ),
    "granite": Family(
        "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|tool_call|>", "", "<|end_of_text|>", "<|end_of_text|>",
        calls=True, lists_tools=True,
    ),
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be terse."}
ASKED, ASKED_AGAIN = {"role": "user", "content": "Is it 7?"}, {"role": "user", "content": "And é?"}
SAID, SAID_AGAIN = {"role": "assistant", "content": "It is."}, {"role": "assistant", "content": "No 🙂."}
THOUGHT = SAID_AGAIN | {"reasoning_content": "é is a letter."}
ARGUMENTS = {"city": "Łódź", "days": 2}
CALL = {"role": "assistant", "tool_calls": [{"id": "abcdef123", "function": {"name": "sky", "arguments": ARGUMENTS}}]}
RESULT = {"role": "tool", "content": "rain, 4 mm", "tool_call_id": "abcdef123"}
SKY = {
    "type": "function",
    "function": {
        "name": "sky",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def chat_of(name: str) -> tuple[ChatFormat, PreTrainedTokenizerFast]:
    family, tokenizer = FAMILIES[name], byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": family.special.split()})
    tokenizer.bos_token, tokenizer.eos_token = family.bos or None, family.eos
    tokenizer.chat_template = template_file(name).read_text(encoding="utf-8")
    return ChatFormat(tokenizer), tokenizer


def learned(name: str, messages: Any, tools: Any = None, **settings: Any) -> tuple[list[str], str, list[str]]:
    """The texts that are learned, what stands before the last of them, and the doubts that were told."""
    chat, tokenizer = chat_of(name)
    doubts: list[str] = []
    messages = chat.check(messages, "assistant")
    token_ids, mask = chat.training_ids(messages, tools, doubt=lambda why, _: doubts.append(why), **settings)
    starts = [place for place in range(len(mask)) if mask[place] and not mask[place - 1]]
    ends = [place + 1 for place in range(len(mask)) if mask[place] and not (mask[place + 1 :] or [0])[0]]
    said = [tokenizer.decode(token_ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    asked = chat.prompt_ids(messages[:-1], tools)
    assert token_ids[: starts[-1]] == asked, (
        f"{tokenizer.decode(token_ids[: starts[-1]])!r}\n{tokenizer.decode(asked)!r}"
    )
    return said, tokenizer.decode(asked), doubts


def test_every_shipped_template_is_tested_and_documented() -> None:
    assert set(FAMILIES) == set(SHIPPED)
    page = (Path(__file__).parents[2] / "docs" / "sft.md").read_text(encoding="utf-8")
    table = page.split("| name | for |")[1].split("\n\n")[0]
    assert {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")
    } == set(SHIPPED)


def test_a_template_for_another_tokenizer_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template_file("chatml").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="special token of the tokenizer"):
        ChatFormat(tokenizer).training_ids([ASKED, SAID])


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("opening", [[], [SYSTEM]], ids=["bare", "system"])
def test_one_answer(name: str, opening: list[Any]) -> None:
    family = FAMILIES[name]
    said, prompt, doubts = learned(name, [*opening, ASKED, SAID])
    before = EMPTY + "\n" if name == "qwen3" else family.before
    assert (said, doubts) == ([before + SAID["content"] + family.end], [])
    assert ("Be terse." in prompt) == bool(opening)
    chat, tokenizer = chat_of(name)
    ends = [family.end, family.call_end] if family.call_end else [family.end]
    assert tokenizer.convert_ids_to_tokens(chat.end_ids()) == ends


@pytest.mark.parametrize("name", SHIPPED)
def test_several_turns(name: str) -> None:
    family = FAMILIES[name]
    said, prompt, doubts = learned(name, [SYSTEM, ASKED, SAID, ASKED_AGAIN, SAID_AGAIN])
    last = (EMPTY + "\n" if name == "qwen3" else family.before) + SAID_AGAIN["content"] + family.end
    if family.history_learned:
        assert (said, doubts) == ([family.before + SAID["content"] + family.end, last], [])
    else:
        assert (said, doubts) == ([last], ["answer outside {% generation %}"])
    assert prompt.index("Be terse.") < prompt.index("Is it 7?") < prompt.index("It is.") < prompt.index("And é?")
    unlearned, _, doubts = learned(name, [ASKED, SAID | {"weight": 0}, ASKED_AGAIN, SAID_AGAIN])
    assert (unlearned, doubts) == ([last], [])


@pytest.mark.parametrize("name", SHIPPED)
def test_thinking_is_learned_or_refused(name: str) -> None:
    if not FAMILIES[name].thinks:
        with pytest.raises(BadRowError, match="reasoning that the chat template leaves out"):
            learned(name, [ASKED_AGAIN, THOUGHT])
        assert learned(name, [ASKED_AGAIN, THOUGHT], reasoning="drop") == learned(name, [ASKED_AGAIN, SAID_AGAIN])
        return
    (said,), _, _ = learned(name, [ASKED_AGAIN, THOUGHT])
    assert said.index("é is a letter.") < said.index("No 🙂.")
    if name != "gpt_oss":  # whose channels are no part of a text
        inline = {"role": "assistant", "content": "<think>\né is a letter.\n</think>\n\nNo 🙂."}
        (written,), _, _ = learned(name, [ASKED_AGAIN, inline])
        assert "".join(written.split()) == "".join(said.split())


def test_what_becomes_of_the_thinking_of_earlier_answers() -> None:
    turns = [ASKED_AGAIN, THOUGHT, ASKED, THOUGHT]
    with pytest.raises(BadRowError, match=r"reasoning that .* set data\.reasoning"):
        learned("qwen3", turns)
    (first, last), _, _ = learned("qwen3", turns, reasoning="template")
    assert (first, "é is a letter." in last) == ("No 🙂.<|im_end|>", True)
    (first, last), _, _ = learned("smollm3", turns)
    assert first == last == "<think>\né is a letter.\n</think>\nNo 🙂.<|im_end|>"
    (only,), _, _ = learned("qwen3", [ASKED_AGAIN, THOUGHT | {"weight": 0}, ASKED, THOUGHT])
    assert only == last.replace("</think>\n", "</think>\n\n")


@pytest.mark.parametrize("name", SHIPPED)
def test_tools_are_learned_or_refused(name: str) -> None:
    family, turns = FAMILIES[name], [SYSTEM, ASKED, CALL, RESULT, SAID_AGAIN]
    tools = [SKY] if family.lists_tools else None
    if not family.calls:
        with pytest.raises(BadRowError, match=r"leaves out|refused by the chat template"):
            learned(name, turns)
    else:
        (call, answer), prompt, doubts = learned(name, turns, tools)
        assert not doubts
        assert call.endswith(family.call_end or family.end) and answer.endswith("No 🙂." + family.end)
        assert '"city": "Łódź"' in call and '"days": 2' in call and "sky" in call
        assert prompt.index('"city": "Łódź"') < prompt.index("rain, 4 mm")
    if not family.lists_tools:
        with pytest.raises(BadRowError, match="tools that the chat template leaves out"):
            learned(name, [ASKED, SAID], [SKY])


@pytest.mark.parametrize("name", [name for name in SHIPPED if FAMILIES[name].calls and name != "llama3_1"])
def test_several_calls_and_results(name: str) -> None:
    calls = [{"function": {"name": "sky", "arguments": f'{{"city": "{city}"}}'}} for city in ("Oslo", "Bonn")]
    both = CALL | {"tool_calls": calls}
    turns = [ASKED, both, RESULT | {"content": "snow"}, RESULT | {"content": "fog"}, SAID]
    (call, _), prompt, _ = learned(name, turns, [SKY] if FAMILIES[name].lists_tools else None)
    assert call.index("Oslo") < call.index("Bonn")
    assert prompt.index("snow") < prompt.index("fog")


def test_a_form_written_out() -> None:
    _, prompt, _ = learned("qwen2_5", [ASKED, CALL, RESULT, RESULT, SAID], [{"name": "sky"}])
    assert prompt.startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
    )
    assert prompt.endswith(
        "</tool_call><|im_end|>\n<|im_start|>user\nIs it 7?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "sky", "arguments": {"city": "Łódź", "days": 2}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>\nrain, 4 mm\n</tool_response>\n<tool_response>\nrain, 4 mm\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    _, prompt, _ = learned("deepseek_v3", [ASKED, CALL, RESULT, SAID])
    assert prompt.replace(BAR, "|") == (
        "<|begin▁of▁sentence|><|User|>Is it 7?<|Assistant|><|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>"
        'sky\n```json\n{"city": "Łódź", "days": 2}\n```<|tool▁call▁end|><|tool▁calls▁end|><|end▁of▁sentence|>'
        "<|tool▁outputs▁begin|><|tool▁output▁begin|>rain, 4 mm<|tool▁output▁end|><|tool▁outputs▁end|>"
    )
    _, prompt, _ = learned("gemma", [SYSTEM, ASKED, SAID, ASKED_AGAIN, SAID_AGAIN])
    assert prompt == (
        "<bos><start_of_turn>user\nBe terse.\n\nIs it 7?<end_of_turn>\n<start_of_turn>model\nIt is.<end_of_turn>\n"
        "<start_of_turn>user\nAnd é?<end_of_turn>\n<start_of_turn>model\n"
    )
    _, prompt, _ = learned("glm4", [ASKED, CALL, RESULT, SAID, ASKED_AGAIN, SAID_AGAIN])
    assert prompt == (
        '[gMASK]<sop><|user|>\nIs it 7?<|assistant|>sky\n{"city": "Łódź", "days": 2}<|observation|>\nrain, 4 mm'
        "<|assistant|>\nIt is.<|user|>\nAnd é?<|assistant|>"
    )
    _, prompt, _ = learned("mistral", [SYSTEM, ASKED, SAID, ASKED_AGAIN, SAID_AGAIN])
    assert prompt == "<s>[SYSTEM_PROMPT]Be terse.[/SYSTEM_PROMPT][INST]Is it 7?[/INST]It is.</s>[INST]And é?[/INST]"
