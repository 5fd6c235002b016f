"""Messages of data sets, checked and brought to one form. A part that has no place in it is refused, not dropped."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pipeline.data.rows import BadRowError, check_characters

Message = dict[str, Any]
"""`role` and `content`, both text; perhaps `reasoning_content`, `tool_calls`, `tool_call_id`, `name`, `weight`."""

Reasoning = Literal["train", "template", "drop"]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The names that data sets and chat templates have for an assistant's reasoning."""
KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "weight", *REASONING_KEYS)
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant", "tool")
FOLLOWERS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
"""The roles that may come after each; `calls` is an assistant that calls tools."""

REASONING_REMEDY = (
    "; set data.reasoning to template or drop, weight 0 on that answer, or take a chat_template that renders it"
)
INLINE = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)
"""An answer that holds its reasoning; the template may have written the first mark, as part of the prompt."""


def checked_messages(value: Any, last_role: str) -> list[Message]:
    """`value` as messages of one form: perhaps a system message, then user and assistant in turns, the last of
    `last_role`. An assistant's tool calls are followed by their results, and then by the assistant again.

    Reads OpenAI's form {role, content} and ShareGPT's {from, value}; text in parts is joined, keys whose value is null
    are as good as absent. Raises BadRowError for anything else: no text, an unknown key or role, another order, an
    empty message.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRowError("not a list of {role, content}", repr(value)[:80])
    messages = [checked_message(message) for message in value]
    _check_order(messages, last_role)
    return messages


def checked_tools(value: Any) -> list[dict[str, Any]]:
    """The definitions of the tools an assistant may call: a list of JSON objects, or JSON text of one. Raises
    BadRowError for anything else."""
    tools = _from_json(value, "tools that are not a list of objects") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _tool_name(tool) for tool in tools):
        raise BadRowError("tools that are not a list of objects", f"each with a name: {value!r}"[:120])
    if not isinstance(value, str) and any(_has_null(tool) for tool in tools):
        raise BadRowError("tools with nulls", "columnar files fill them in; write the column as JSON text")
    return tools


def has_tools(value: Any) -> bool:
    """Return whether a column holds definitions of tools, rather than something else of that name."""
    try:
        return bool(value) and bool(checked_tools(value))
    except BadRowError:
        return False


def text_only(messages: list[Message]) -> list[Message]:
    """The messages as {role, content} alone. Raises BadRowError for one that holds more: prompts, rollouts and
    rewards deal with text alone."""
    for message in messages:
        more = set(message) - {"role", "content", "weight"}
        if more or message["role"] == "tool":
            parts = ", ".join(sorted(more)) or "a tool's result"
            raise BadRowError("more than text in a message", f"{parts}; only sft data may have it, remove it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def without_reasoning(messages: list[Message]) -> list[Message]:
    """The messages without any assistant's reasoning, in a key of its own or at the start of the text between <think>
    and </think>. Raises BadRowError for a </think> that nothing began: it may end reasoning, or be spoken of."""
    copies = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
    for message in copies:
        if message["role"] != "assistant" or not (inline := INLINE.fullmatch(message["content"])):
            continue
        if not message["content"].lstrip().startswith("<think>"):
            raise BadRowError(
                "reasoning whose beginning is missing", f"{message['content'][:80]!r}; begin it with <think>"
            )
        message["content"] = inline["answer"].lstrip("\n")
        if not message["content"].strip() and "tool_calls" not in message:
            raise BadRowError("an answer of reasoning alone")
    return copies


def lost(messages: Iterable[Message], text: str, reasoning: Reasoning = "template") -> tuple[str, str] | None:
    """The longest part of `messages` that `text` lacks, as (reason, detail); None where it has them all.

    Every part needs a place of its own: where a word occurs in two parts, one occurrence is not enough. White
    space around a part doesn't count. With "template" an assistant's reasoning may be missing.
    """
    parts = [part for message in messages for part in _parts(message, text, reasoning) if part[1]]
    for reason, part, remedy in sorted(parts, key=lambda part: -len(part[1])):  # none is found within a longer one
        form = next((form for form in (part, _as_json(part)) if form in text), None)
        if form is None:
            return reason, f"{part[:80]!r}{remedy}"
        text = text.replace(form, "\0", 1)
    return None


def lost_tools(tools: list[dict[str, Any]], text: str) -> tuple[str, str] | None:
    """The first of the tools whose name `text` lacks, as (reason, detail); None where it names them all."""
    missing = [name for tool in tools if (name := _tool_name(tool)) not in text]
    return ("tools that the chat template leaves out", f"{missing[0]!r}") if missing else None


def texts_of(message: Message) -> Iterator[str]:
    """Every text in a message that reaches the rendered conversation."""
    yield message["content"]
    yield from (message[key] for key in ("reasoning_content", "name", "tool_call_id") if key in message)
    for call in message.get("tool_calls", []):
        yield from (call["function"]["name"], *texts_in(call["function"]["arguments"]))


def _parts(message: Message, text: str, reasoning: Reasoning) -> Iterator[tuple[str, str, str]]:
    """The parts of a message that `text` should contain, each as (reason to refuse a row without it, part, remedy)."""
    thinking, content = message.get("reasoning_content", ""), message["content"]
    whole = content.strip() in text or _as_json(content.strip()) in text
    if not whole and message["role"] == "assistant" and (inline := INLINE.fullmatch(content)):
        thinking, content = inline["thinking"], inline["answer"]
    yield f"{message['role']} message that the chat template changes or leaves out", content.strip(), ""
    if reasoning == "train":
        yield "reasoning that the chat template leaves out", thinking.strip(), REASONING_REMEDY
    for call in message.get("tool_calls", []):
        for part in (call["function"]["name"], *texts_in(call["function"]["arguments"])):
            yield "tool call that the chat template leaves out", part.strip(), ""


def _as_json(text: str) -> str:
    """The text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def checked_message(raw: Mapping[str, Any]) -> Message:
    """One message of any form in the one form. Raises BadRowError as checked_messages does."""
    fields = {key: value for key, value in raw.items() if value is not None and value != []}
    if "from" in fields and "role" not in fields:
        fields = {{"from": "role", "value": "content"}.get(key, key): value for key, value in fields.items()}
        fields["role"] = SHAREGPT_ROLES.get(fields["role"]) if isinstance(fields["role"], str) else None
        if fields["role"] is None:
            raise BadRowError("unknown role", f"from={raw['from']!r}, known: {', '.join(SHAREGPT_ROLES)}"[:120])
    for key in fields:
        if key not in KEYS:
            raise BadRowError("unknown key of a message", f"'{key}' (known: {', '.join(KEYS)}); remove or rename it")
    role = fields.get("role")
    if not isinstance(role, str):
        raise BadRowError("not a list of {role, content}", repr(raw)[:80])
    if role not in ROLES:
        raise BadRowError("unknown role", f"{role!r}, known: {', '.join(ROLES)}"[:120])
    calls = [_checked_call(call) for call in _only_from("assistant", role, fields, "tool_calls", list) or []]
    message: Message = {"role": role, "content": _text(fields.get("content", "" if calls else None), raw)}
    reasoning = _reasoning(role, fields)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if (identity := _only_from("tool", role, fields, "tool_call_id", str)) is not None:
        message["tool_call_id"] = identity
    if (name := fields.get("name")) is not None:
        if not isinstance(name, str) or not name.strip():
            raise BadRowError("name of a message that is no text", f"{name!r}"[:80])
        message["name"] = name
    if _weight(role, fields) == 0 and role == "assistant":
        message["weight"] = 0
    for text in texts_of(message):
        check_characters(text)
    if not message["content"].strip() and not calls and role != "tool":
        raise BadRowError(f"empty {role} message")
    return message


def _check_order(messages: list[Message], last_role: str) -> None:
    before = "start"
    shown = " ".join(message["role"] for message in messages)[:80]
    for message in messages:
        if message["role"] not in FOLLOWERS[before]:
            raise BadRowError("roles don't alternate", shown)
        before = "calls" if "tool_calls" in message else message["role"]
    if not messages or messages[-1]["role"] == "system":
        raise BadRowError("roles don't alternate", shown)
    if messages[-1]["role"] != last_role:
        raise BadRowError(f"does not end with the {last_role}", shown)


def _text(content: Any, message: Mapping[str, Any]) -> str:
    """The text of a message's content: text, or parts {type: text, text: ...}, joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRowError("not a list of {role, content}", repr(message)[:80])
    parts: list[str] = []
    for part in content:
        fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if set(fields) != {"type", "text"} or fields["type"] != "text" or not isinstance(fields["text"], str):
            raise BadRowError("content part that is no text", f"{part!r}, wanted {{type: text, text: ...}}"[:120])
        parts.append(fields["text"])
    return "".join(parts)


def _reasoning(role: str, fields: Mapping[str, Any]) -> str:
    """The reasoning of an assistant's message, whatever its key is called; "" where there is none."""
    texts = {fields[key] if isinstance(fields[key], str) else None for key in REASONING_KEYS if key in fields}
    if None in texts:
        raise BadRowError("reasoning that is no text", ", ".join(key for key in REASONING_KEYS if key in fields))
    texts -= {""}
    if texts and role != "assistant":
        raise BadRowError("reasoning of another than the assistant", role)
    if len(texts) > 1:
        raise BadRowError("two different texts of reasoning", ", ".join(key for key in REASONING_KEYS if key in fields))
    reasoning = str(next(iter(texts), ""))
    if reasoning.strip() and "</think>" in str(fields.get("content", "")):
        raise BadRowError("two different texts of reasoning", "one in its own key, one before </think>")
    return reasoning if reasoning.strip() else ""


def _weight(role: str, fields: Mapping[str, Any]) -> int:
    weight = fields.get("weight", 1)
    if isinstance(weight, str) or weight not in (0, 1):
        raise BadRowError("weight that is neither 0 nor 1", f"{weight!r}"[:80])
    if weight == 1 and "weight" in fields and role != "assistant":
        raise BadRowError("weight 1 on another than the assistant", f"{role}: only answers are trained on")
    return int(weight)


def _checked_call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments as an object."""
    fields = {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else {}
    function = fields.get("function", {key: value for key, value in fields.items() if key in ("name", "arguments")})
    has_name = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"].strip()
    unknown = set(fields) - (
        {"id", "type", "function"} if "function" in fields else {"id", "type", "name", "arguments"}
    )
    if not has_name or unknown or set(function) - {"name", "arguments"} or fields.get("type", "function") != "function":
        raise BadRowError("tool call without {function: {name, arguments}}", f"{call!r}"[:120])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, "tool call whose arguments are not a JSON object")
    elif _has_null(arguments):
        raise BadRowError("tool call with null arguments", "columnar files fill them in; write arguments as JSON text")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRowError("tool call whose arguments are not a JSON object", f"{arguments!r}"[:80])
    identity = {"id": fields["id"]} if "id" in fields else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _only_from(wanted: str, role: str, fields: Mapping[str, Any], key: str, form: type) -> Any:
    value = fields.get(key)
    if value is not None and (role != wanted or not isinstance(value, form)):
        raise BadRowError(f"{key} that is no {form.__name__} of the {wanted}", f"{role}: {value!r}"[:120])
    return value


def _from_json(text: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(reason, str(error)) from error


def _tool_name(tool: Mapping[str, Any]) -> str:
    name = (tool["function"] if isinstance(tool.get("function"), dict) else tool).get("name")
    return name if isinstance(name, str) else ""


def _has_null(value: Any) -> bool:
    """Return whether a JSON value holds a null, or is or holds a number that JSON can't express, at any depth."""
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    if isinstance(value, list):
        return any(item is None or _has_null(item) for item in value)
    return isinstance(value, float) and not math.isfinite(value)


def texts_in(value: Any) -> Iterator[str]:
    """The keys and the texts within a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value
