"""Messages: every form that data sets have is read as it is meant, and what can't be used is refused by name."""

from typing import Any

import pytest

from pipeline.data.chat import ChatFormat
from pipeline.data.messages import has_tools, parse_messages, parse_tools, text_only
from pipeline.data.rows import BadRowError
from pipeline.models.tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
REASONS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think>' + m.KEY + '</think>' if m.KEY }}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def user(content: Any = "why?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = "so", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def trained(messages: list[Any], template: str = CHATML, **settings: Any) -> str:
    """The text that is learned of a conversation."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer)
    token_ids, mask = chat.training_ids(chat.check(messages, "assistant"), **settings)
    return tokenizer.decode([token_id for token_id, learned in zip(token_ids, mask, strict=True) if learned])


def reason(messages: Any, last_role: str = "assistant") -> str:
    with pytest.raises(BadRowError) as caught:
        parse_messages(messages, last_role)
    return caught.value.reason


PLAIN = [user(), assistant()]


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}],
        [{"from": "user", "value": "why?"}, {"from": "assistant", "value": "so", "weight": None}],
        [user([{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]), assistant()],
        [user(name=None, tool_calls=None, weight=None), assistant(tool_calls=[], reasoning_content=None, weight=1)],
        [user(weight=0), assistant(weight=1.0)],
        [user([{"type": "text", "text": "why?", "image_url": None}]), assistant(thinking="", weight=True)],
    ],
)
def test_other_forms_of_the_same_conversation(messages: Any) -> None:
    assert parse_messages(messages, "assistant") == PLAIN


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (assistant(reasoning="r"), "reasoning_content"),
        (assistant(thinking="r"), "reasoning_content"),
        (assistant(reasoning_content="r", thinking="r"), "reasoning_content"),
        (assistant(name="Bo"), "name"),
        (assistant(weight=0.0), "weight"),
        (assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "tool_calls"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"a": 1}}]), "tool_calls"),
    ],
)
def test_what_a_message_may_have_beside_its_text(message: Any, wanted: str) -> None:
    kept = parse_messages([user(), message], "assistant")[1]
    assert set(kept) == {"role", "content", wanted}


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ("text", "not a list of"),
        ([user(), "text"], "not a list of"),
        ([user(), None], "not a list of"),
        ([user(5), assistant()], "not a list of"),
        ([user({"type": "text", "text": "x"}), assistant()], "not a list of"),
        ([{"content": "x"}, assistant()], "not a list of"),
        ([{"role": 3, "content": "x"}, assistant()], "not a list of"),
        ([user(None), assistant()], "not a list of"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant()], "content part that is no text"),
        ([user([{"type": "text", "text": "x", "cache_control": {}}]), assistant()], "content part that is no text"),
        ([user(["x"]), assistant()], "content part that is no text"),
        ([user([{"type": "text"}]), assistant()], "content part that is no text"),
        ([user(), assistant([{"type": "thinking", "thinking": "x"}])], "content part that is no text"),
        ([user(), assistant(audio={"id": 1})], "unknown key of a message"),
        ([user(), assistant(function_call={"name": "f"})], "unknown key of a message"),
        ([user(), assistant(Reasoning="r")], "unknown key of a message"),
        ([{"from": "human", "role": "user", "value": "x"}, assistant()], "unknown key of a message"),
        ([{"from": "human", "value": "x", "label": 1}, assistant()], "unknown key of a message"),
        ([{"role": "critic", "content": "x"}, assistant()], "unknown role"),
        ([{"from": "observation", "value": "x"}, assistant()], "unknown role"),
        ([{"from": ["human"], "value": "x"}, assistant()], "unknown role"),
        ([user(), assistant(weight=0.5)], "weight that is neither"),
        ([user(), assistant(weight="0")], "weight that is neither"),
        ([user(), assistant(weight=-1)], "weight that is neither"),
        ([user(), assistant(weight=[0])], "weight that is neither"),
        ([user(), assistant(weight=float("nan"))], "weight that is neither"),
        ([user(weight=1), assistant()], "weight 1 on another"),
        ([user(), assistant(name=3)], "name of a message"),
        ([user(), assistant(reasoning_content=["r"])], "reasoning that is no text"),
        ([user(thinking="hm"), assistant()], "reasoning of another"),
        ([user(), assistant(reasoning="a", thinking="b")], "two different texts of reasoning"),
        ([user(), assistant("<think>a</think>b", thinking="c")], "two different texts of reasoning"),
        ([user(), assistant(" ", thinking="c")], "empty assistant message"),
        ([user(), assistant(" ", weight=0), user(), assistant()], "empty assistant message"),
        ([user("\ud83d"), assistant()], "half a surrogate pair"),
        ([user(), assistant(reasoning_content="\udc00")], "half a surrogate pair"),
        ([user(tool_calls=[{"name": "f"}]), assistant()], "tool_calls that is no list"),
        ([user(), assistant(tool_calls={"name": "f"})], "tool_calls that is no list"),
        ([user(), assistant(tool_call_id="x")], "tool_call_id that is no str"),
        ([user(), assistant(tool_calls=[{"id": "x"}])], "tool call without"),
        ([user(), assistant(tool_calls=["f"])], "tool call without"),
        ([user(), assistant(tool_calls=[{"type": "web", "function": {"name": "f"}}])], "tool call without"),
        ([user(), assistant(tool_calls=[{"name": "f", "arguments": "{"}])], "tool call whose arguments"),
        ([user(), assistant(tool_calls=[{"name": "f", "arguments": "[1]"}])], "tool call whose arguments"),
        ([user(), assistant(tool_calls=[{"name": "f", "arguments": {"a": None}}])], "tool call with null"),
        ([user(), assistant(tool_calls=[{"name": "f"}]), user(), assistant()], "roles don't alternate"),
        ([user(), {"role": "tool", "content": "x"}, assistant()], "roles don't alternate"),
    ],
)  # fmt: skip
def test_what_can_not_be_used_is_refused(messages: Any, wanted: str) -> None:
    assert reason(messages).startswith(wanted)


def test_a_null_in_the_text_of_arguments_is_meant() -> None:
    call = {"name": "f", "arguments": '{"a": null}'}
    assert parse_messages([user(), assistant(tool_calls=[call])], "assistant")[1]["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": {"a": None},
    }


def test_results_of_tools_follow_their_calls() -> None:
    call, result = assistant("", tool_calls=[{"name": "f"}]), {"role": "tool", "content": "", "name": "f"}
    roles = [m["role"] for m in parse_messages([user(), call, result, result, call, result, assistant()], "assistant")]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert reason([user(), call, result, user()], "user") == "roles don't alternate"
    assert reason([user(), call, result]) == "does not end with the assistant"


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ([{"type": "function", "function": {"name": "f", "parameters": {}}}], True),
        ([{"name": "f"}], True),
        ('[{"name": "f", "default": null}]', True),
        ([{"name": "f", "default": None}], False),
        ([{"description": "nameless"}], False),
        ('[{"name": "f"}', False),
        ('{"name": "f"}', False),
        (["f"], False),
        ("hammer, saw", False),
    ],
)
def test_definitions_of_tools(value: Any, good: bool) -> None:
    assert has_tools(value) == good
    if not good:
        with pytest.raises(BadRowError, match="tools"):
            parse_tools(value)


def test_prompts_hold_text_alone() -> None:
    assert text_only([user(), assistant(weight=0), user()]) == [user(), assistant(), user()]
    for more in ({"reasoning_content": "r"}, {"name": "Bo"}, {"tool_calls": [{}]}):
        with pytest.raises(BadRowError, match="more than text"):
            text_only([user(), assistant(**more), user()])


@pytest.mark.parametrize("turn", [assistant(weight=0), assistant(weight=0, reasoning_content="r")])
def test_answers_of_weight_0_are_context(turn: dict[str, Any]) -> None:
    assert trained([user(), turn, user(), assistant("then")]) == "then<|im_end|>"
    with pytest.raises(BadRowError, match="no answer to train on"):
        trained([user(), turn])


def test_a_name_is_rendered_or_refused() -> None:
    named = CHATML.replace("m.role +", "m.role + (' name=' + m.name if m.name else '') +")
    assert trained([user(name="Bo"), assistant()], named) == "so<|im_end|>"
    with pytest.raises(BadRowError, match="name that the chat template leaves out"):
        trained([user(name="Bo"), assistant()])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template_under_its_name(key: str) -> None:
    template = REASONS.replace("KEY", key)
    for given in ("reasoning_content", "thinking", "reasoning"):
        messages = [user(), assistant(**{given: "step"})]
        assert trained(messages, template) == "<think>step</think>so<|im_end|>"
        assert trained(messages, template, reasoning="drop") == "so<|im_end|>"


@pytest.mark.parametrize("thought", ["4", "so 4", "It is 4 so"])
def test_reasoning_that_the_answer_repeats_is_still_missed(thought: str) -> None:
    messages = [user(), assistant("It is 4 so 4", thinking=thought)]
    with pytest.raises(BadRowError, match="reasoning that the chat template leaves out"):
        trained(messages)
    learned = trained(messages, REASONS.replace("KEY", "thinking"))
    assert learned == f"<think>{thought}</think>It is 4 so 4<|im_end|>"


def test_a_system_message_that_the_question_repeats_is_still_missed() -> None:
    without = "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2]
    messages = [{"role": "system", "content": "why"}, user("why?"), assistant()]
    assert trained(messages) == trained(messages[1:], without) == "so<|im_end|>"
    with pytest.raises(BadRowError, match="system message that the chat template"):
        trained(messages, without)


@pytest.mark.parametrize(
    ("content", "dropped"),
    [
        ("<think>step</think>so", "so"),
        ("<think>\nstep\n</think>\n\nso", "so"),
        ("<think></think>so", "so"),
        ("<think>step</think>close it by </think>", "close it by </think>"),
        ("so", "so"),
        ("<think>so", "<think>so"),
    ],
)
def test_reasoning_within_the_text(content: str, dropped: str) -> None:
    messages = [user(), assistant(content)]
    assert trained(messages) == content + "<|im_end|>"
    assert trained(messages, reasoning="drop") == dropped + "<|im_end|>"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("step</think>so", "whose beginning is missing"),
        ("Close it by </think> at the end.", "whose beginning is missing"),
        ("<think>step</think> \n", "reasoning alone"),
    ],
)
def test_reasoning_that_can_not_be_told_from_the_answer_is_not_dropped(content: str, wanted: str) -> None:
    assert trained([user(), assistant(content)]) == content + "<|im_end|>"
    with pytest.raises(BadRowError, match=wanted):
        trained([user(), assistant(content)], reasoning="drop")


def test_reasoning_that_a_template_cuts_out_of_the_text_is_refused() -> None:
    cutting = CHATML.replace("m.content +", "m.content.split('</think>')[-1] +")
    messages = [user(), assistant("<think>step</think>so")]
    with pytest.raises(BadRowError, match="reasoning that the chat template leaves out"):
        trained(messages, cutting)
    assert trained(messages, cutting, reasoning="template") == "so<|im_end|>"
    assert trained([user(), assistant("<think></think>so")], cutting) == "so<|im_end|>"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("m.content if m.role != 'system' else ''", "system message"),
        ("m.content[:3]", "user message"),
        ("(m.content if m.role == 'user' else m.content | upper)", "assistant message"),
    ],
)
def test_text_that_a_template_leaves_out_or_changes_is_refused(change: str, wanted: str) -> None:
    messages = [{"role": "system", "content": "Ob"}, user("Why then?"), assistant("Because")]
    assert trained(messages) == "Because<|im_end|>"
    with pytest.raises((BadRowError, ValueError), match=f"{wanted}|put \\{{% generation"):
        trained(messages, CHATML.replace("m.content", f"({change})"))


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([user(), assistant("a <think>b</think> c")], None),
        ([user("<think>"), assistant()], "<think>"),
        ([user(), assistant("a<|im_end|>")], "<|im_end|>"),
        ([user(), assistant("a<|im_start|>user")], "<|im_start|>"),
        ([user(), assistant("a<eos>")], "<eos>"),
        ([user(), assistant("a<pad>")], "<pad>"),
        ([user(), assistant("", tool_calls=[{"name": "f", "arguments": {"a": "<|im_end|>"}}])], "<|im_end|>"),
        ([user(), assistant(reasoning_content="a<eos>")], "<eos>"),
    ],
)
def test_special_tokens_in_the_text(messages: list[Any], found: str | None) -> None:
    if found is None:
        assert trained(messages) == "a <think>b</think> c<|im_end|>"
        return
    with pytest.raises(BadRowError, match="special token in the text") as caught:
        trained(messages)
    assert caught.value.detail == found


def test_arguments_are_given_as_the_template_takes_them() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name + ARGUMENTS }}{% endfor %}"
    for written in ("c.function.arguments | tojson", "'' + c.function.arguments"):
        template = CHATML.replace("+ m.content", "+ m.content }}" + calls.replace("ARGUMENTS", written) + "{{ ''")
        assert trained([user(), assistant("", tool_calls=[{"name": "f", "arguments": {"a": "é"}}])], template) == (
            'f{"a": "é"}<|im_end|>'
        )
