"""Parse the messages of data sets into one form, and refuse rows with parts that have no place in it."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pipeline.data.rows import BadRowError, check_characters

Message = dict[str, Any]
"""`role` and `content`, both text; optionally `reasoning_content`, `tool_calls`, `tool_call_id`, `name`, `weight`."""

Reasoning = Literal["train", "template", "drop"]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's reasoning in data sets and chat templates."""
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "weight", *REASONING_KEYS)
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = ("system", "user", "assistant", "tool")
_FOLLOWERS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Roles that may follow each role; `calls` is an assistant's message with tool calls."""

_REASONING_REMEDY = (
    "; set data.reasoning to template or drop, weight 0 on that answer, or take a chat_template that renders it"
)
_INLINE = re.compile(r"\s*(?:<think>)?(?P<thinking>.*?)</think>(?P<answer>.*)", re.DOTALL)
"""An answer with its reasoning in the text; the template may have written <think> as part of the prompt."""


def parse_messages(value: Any, last_role: str) -> list[Message]:
    """Parse `value` as a conversation: an optional system message, then user and assistant in turns.

    The last message is of `last_role`. An assistant's tool calls are followed by their results, then by the assistant.
    OpenAI's form {role, content} and ShareGPT's {from, value} are accepted; text parts are joined, and keys with null
    are ignored. Raises BadRowError for anything else: no text, an unknown key or role, another order, an empty message.

    Example: `parse_messages([{"from": "human", "value": "2+2?"}], last_role="user")`
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRowError("not a list of {role, content}", repr(value)[:80])
    messages = [parse_message(message) for message in value]
    _check_order(messages, last_role)
    return messages


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Parse definitions of tools from a list of JSON objects, or from its JSON text. Raises BadRowError."""
    tools = _from_json(value, "tools that are not a list of objects") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _tool_name(tool) for tool in tools):
        raise BadRowError("tools that are not a list of objects", f"each with a name: {value!r}"[:120])
    if not isinstance(value, str) and any(_has_null(tool) for tool in tools):
        raise BadRowError("tools with nulls", "columnar files fill them in; write the column as JSON text")
    return tools


def has_tools(value: Any) -> bool:
    """Return True if a column holds definitions of tools."""
    try:
        return bool(value) and bool(parse_tools(value))
    except BadRowError:
        return False


def text_only(messages: list[Message]) -> list[Message]:
    """Reduce messages to {role, content}; raise BadRowError for a message with more.

    Prompts, rollouts and rewards support only text.
    """
    for message in messages:
        other_keys = set(message) - {"role", "content", "weight"}
        if other_keys or message["role"] == "tool":
            parts = ", ".join(sorted(other_keys)) or "a tool's result"
            raise BadRowError("more than text in a message", f"{parts}; only sft data may have it, remove it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def without_reasoning(messages: list[Message]) -> list[Message]:
    """Remove the assistant's reasoning from its own key, or from between <think> and </think> at the start of the text.

    Raises BadRowError for a </think> without <think>, which may be the end of reasoning or a quotation.
    """
    copies = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
    for message in copies:
        if message["role"] != "assistant" or not (inline := _INLINE.fullmatch(message["content"])):
            continue
        if not message["content"].lstrip().startswith("<think>"):
            raise BadRowError(
                "reasoning whose beginning is missing", f"{message['content'][:80]!r}; begin it with <think>"
            )
        message["content"] = inline["answer"].lstrip("\n")
        if not message["content"].strip() and "tool_calls" not in message:
            raise BadRowError("an answer of reasoning alone")
    return copies


def missing_part(messages: Iterable[Message], text: str, reasoning: Reasoning = "template") -> tuple[str, str] | None:
    """Return the longest part of `messages` that is missing in `text` as (reason, detail), None if none is.

    Each part needs its own occurrence in the text. White space around a part is ignored. With "template", an
    assistant's reasoning may be missing.
    """
    parts = [part for message in messages for part in _parts(message, text, reasoning) if part[1]]
    # Longest first, so that a part does not match inside a longer one.
    for reason, part, remedy in sorted(parts, key=lambda part: -len(part[1])):
        form = next((form for form in (part, _as_json(part)) if form in text), None)
        if form is None:
            return reason, f"{part[:80]!r}{remedy}"
        text = text.replace(form, "\0", 1)
    return None


def missing_tool(tools: list[dict[str, Any]], text: str) -> tuple[str, str] | None:
    """Return the first tool whose name is missing in `text` as (reason, detail), None if none is."""
    missing = [name for tool in tools if (name := _tool_name(tool)) not in text]
    return ("tools that the chat template leaves out", f"{missing[0]!r}") if missing else None


def texts_of(message: Message) -> Iterator[str]:
    """Yield every text of a message that a template may render."""
    yield message["content"]
    yield from (message[key] for key in ("reasoning_content", "name", "tool_call_id") if key in message)
    for call in message.get("tool_calls", []):
        yield from (call["function"]["name"], *texts_in(call["function"]["arguments"]))


def _parts(message: Message, text: str, reasoning: Reasoning) -> Iterator[tuple[str, str, str]]:
    """Yield the parts of a message that `text` must contain, as (reason to refuse the row, part, remedy)."""
    thinking, content = message.get("reasoning_content", ""), message["content"]
    is_complete = content.strip() in text or _as_json(content.strip()) in text
    if not is_complete and message["role"] == "assistant" and (inline := _INLINE.fullmatch(content)):
        thinking, content = inline["thinking"], inline["answer"]
    yield f"{message['role']} message that the chat template changes or leaves out", content.strip(), ""
    if reasoning == "train":
        yield "reasoning that the chat template leaves out", thinking.strip(), _REASONING_REMEDY
    for call in message.get("tool_calls", []):
        for part in (call["function"]["name"], *texts_in(call["function"]["arguments"])):
            yield "tool call that the chat template leaves out", part.strip(), ""


def _as_json(text: str) -> str:
    """Return the text as it is written within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def parse_message(raw: Mapping[str, Any]) -> Message:
    """Parse one message of any form. Raises BadRowError."""
    fields = {key: value for key, value in raw.items() if value is not None and value != []}
    if "from" in fields and "role" not in fields:
        fields = {{"from": "role", "value": "content"}.get(key, key): value for key, value in fields.items()}
        fields["role"] = _SHAREGPT_ROLES.get(fields["role"]) if isinstance(fields["role"], str) else None
        if fields["role"] is None:
            raise BadRowError("unknown role", f"from={raw['from']!r}, known: {', '.join(_SHAREGPT_ROLES)}"[:120])
    for key in fields:
        if key not in _KEYS:
            raise BadRowError("unknown key of a message", f"'{key}' (known: {', '.join(_KEYS)}); remove or rename it")
    role = fields.get("role")
    if not isinstance(role, str):
        raise BadRowError("not a list of {role, content}", repr(raw)[:80])
    if role not in _ROLES:
        raise BadRowError("unknown role", f"{role!r}, known: {', '.join(_ROLES)}"[:120])
    calls = [_parse_call(call) for call in _only_from("assistant", role, fields, "tool_calls", list) or []]
    message: Message = {"role": role, "content": _text(fields.get("content", "" if calls else None), raw)}
    reasoning = _reasoning(role, fields)
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if (call_id := _only_from("tool", role, fields, "tool_call_id", str)) is not None:
        message["tool_call_id"] = call_id
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
    previous = "start"
    roles = " ".join(message["role"] for message in messages)[:80]
    for message in messages:
        if message["role"] not in _FOLLOWERS[previous]:
            raise BadRowError("roles don't alternate", roles)
        previous = "calls" if "tool_calls" in message else message["role"]
    if not messages or messages[-1]["role"] == "system":
        raise BadRowError("roles don't alternate", roles)
    if messages[-1]["role"] != last_role:
        raise BadRowError(f"does not end with the {last_role}", roles)


def _text(content: Any, message: Mapping[str, Any]) -> str:
    """Return the text of a message's content, which is text or parts {type: text, text: ...}."""
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
    """Return the reasoning of an assistant's message under any of its keys, "" without any."""
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


def _parse_call(call: Any) -> dict[str, Any]:
    """Parse a tool call into OpenAI's form, with its arguments as an object."""
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
    call_id = {"id": fields["id"]} if "id" in fields else {}
    return call_id | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _only_from(expected_role: str, role: str, fields: Mapping[str, Any], key: str, form: type) -> Any:
    value = fields.get(key)
    if value is not None and (role != expected_role or not isinstance(value, form)):
        raise BadRowError(f"{key} that is no {form.__name__} of the {expected_role}", f"{role}: {value!r}"[:120])
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
    """Return True if a JSON value contains a null, or a number that is not finite, at any depth."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return any(item is None or _has_null(item) for item in items)
    return isinstance(value, float) and not math.isfinite(value)


def texts_in(value: Any) -> Iterator[str]:
    """Yield the keys and texts within a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value
