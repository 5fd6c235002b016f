"""Conversations and prompts: loaded, checked, cached, and taken in the same order after a resume."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.data import ConversationData, FileSource, PromptData
from configs.load import load_config
from configs.sft import SFTConfig
from pipeline.data.conversations import Conversations
from pipeline.data.prompts import Prompts
from pipeline.models.tokenizer import byte_tokenizer
from rewards.rules.gym import GymReward
from rewards.types import Task

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def write(file: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "file", "paths": [str(file)]}


def conversations(source: dict[str, Any], cache: Path | None = None, seed: int = 0, **settings: Any) -> Conversations:
    config = ConversationData.model_validate({"source": source, **settings})
    return Conversations.load(config, byte_tokenizer(), cache, seed)


def prompts(source: dict[str, Any], seed: int = 0, **settings: Any) -> Prompts:
    return Prompts.load(PromptData.model_validate({"source": source, **settings}), byte_tokenizer(), seed)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_bad_conversations_are_left_out_and_reported(tmp_path: Path) -> None:
    rows = [chat("q", "a"), {"text": "x"}, {"messages": None}, chat("q", ""), chat("q" * 99, "a"), chat("q", "b")]
    loaded = conversations(write(tmp_path / "c.jsonl", rows), max_bad_share=0.7, max_length=20)
    assert [example.where for example in loaded] == [f"{tmp_path}/c.jsonl:1", f"{tmp_path}/c.jsonl:6"]
    assert loaded.bad_rows.counts == {"missing field": 2, "empty assistant message": 1, "longer than max_length": 1}
    assert loaded.bad_rows.examples[-1].detail == "104 tokens > 20"
    assert loaded[0].token_ids == [1, 3, 8 + ord("q"), 4, 8 + ord("a"), 2]
    assert loaded[0].loss_mask == [0, 0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"4 of 6 rows.*2 missing field.*\n.*c\.jsonl:2"):
        conversations(write(tmp_path / "c.jsonl", rows), max_bad_share=0.5, max_length=20)


def test_prompt_and_answer_columns_make_a_conversation(tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", [{"question": "q", "reply": "a"}])
    loaded = conversations(source, prompt="question", answer="reply")
    assert loaded[0].token_ids == conversations(write(tmp_path / "m.jsonl", [chat("q", "a")]))[0].token_ids


def test_the_rows_of_the_documents_first_recipe(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sft.md").read_text(encoding="utf-8")
    (tmp_path / "chat.jsonl").write_text(page.split("chat.jsonl <<'EOF'\n")[1].split("EOF\n")[0])
    (tmp_path / "sft.yaml").write_text(page.split("sft.yaml <<'EOF'\n")[1].split("EOF\n")[0])
    data = load_config(str(tmp_path / "sft.yaml"), [], SFTConfig).config.data
    source = FileSource(type="file", paths=[str(tmp_path / "chat.jsonl")])
    loaded = Conversations.load(data.model_copy(update={"source": source}), byte_tokenizer())
    learned = [
        byte_tokenizer().decode([token for token, mask in zip(row.token_ids, row.loss_mask, strict=True) if mask])
        for row in loaded
    ]
    assert learned == ["4<eos>", "No. 4<eos>", "5<eos>"]
    assert not loaded.bad_rows.counts and loaded.bad_rows.forms.total() == 1


def test_conversations_of_sharegpt_are_read_from_their_column(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    loaded = conversations(write(tmp_path / "s.jsonl", [row]), messages="conversations")
    assert loaded[0].token_ids == conversations(write(tmp_path / "m.jsonl", [chat("q", "a")]))[0].token_ids


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        ({}, {"reasoning that the chat template leaves out": 1}),
        ({"reasoning": "template"}, {}),
        ({"reasoning": "drop"}, {}),
    ],
)
def test_reasoning_is_used_as_the_settings_say(tmp_path: Path, settings: dict[str, str], bad: dict[str, int]) -> None:
    thought = chat("q", "a")
    thought["messages"][1]["reasoning_content"] = "r"
    loaded = conversations(write(tmp_path / "c.jsonl", [chat("q", "a"), thought]), max_bad_share=0.5, **settings)
    assert loaded.bad_rows.counts == bad
    assert len(loaded) == 2 - len(bad)


def test_tools_are_read_from_their_column(tmp_path: Path) -> None:
    row, tool = chat("q", "a"), {"name": "sky"}
    reason = {"tools that the chat template leaves out": 1}
    for tools in ([tool], json.dumps([tool])):
        source = write(tmp_path / "c.jsonl", [chat("q", "a"), row | {"tools": tools}])
        assert conversations(source, max_bad_share=0.5).bad_rows.counts == reason
        assert conversations(source, tools=None).bad_rows.counts == {}
    for empty in (None, [], "", "[]"):
        assert conversations(write(tmp_path / "c.jsonl", [row | {"tools": empty}])).bad_rows.counts == {}
    source = write(tmp_path / "c.jsonl", [row, row | {"tools": "hammer"}, row | {"tools": [{"name": "<eos>"}]}])
    bad = {"tools that are not a list of objects": 1, "special token in the text": 1}
    assert conversations(source, max_bad_share=0.7).bad_rows.counts == bad


def test_doubts_about_a_template_are_kept_with_the_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("{%- generation %}", "{{- '!' }}{%- generation %}")
    config = ConversationData.model_validate({"source": write(tmp_path / "c.jsonl", [chat("q", "a"), chat("q", "b")])})
    for _ in range(2):
        loaded = Conversations.load(config, tokenizer, tmp_path / "cache")
        assert list(loaded.bad_rows.doubts.values()) == [2]
        assert "'!'" in loaded.bad_rows.summary()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": [{"name": "sky"}]}, "tools in a prompt"),
        ({"tools": '[{"name": "sky"}]'}, "tools in a prompt"),
        ({"tools": "hammer, saw"}, None),
        ({"tools": []}, None),
        ({"truth": float("nan")}, "not a finite number"),
        ({"prompt": [{"role": "user", "content": "q", "name": "Bo"}]}, "more than text in a message"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, None),
        ({"prompt": [{"from": "human", "value": "q"}]}, None),
        ({"prompt": ["q"]}, "not a list of {role, content}"),
        ({"prompt": {"role": "user", "content": "q"}}, "not a list of {role, content}"),
        ({"prompt": [None]}, "not a list of {role, content}"),
    ],
)
def test_prompts_hold_text_alone(tmp_path: Path, row: dict[str, Any], reason: str | None) -> None:
    good = {"prompt": "q", "truth": "1"}
    loaded = prompts(write(tmp_path / "p.jsonl", [good, good | row]), max_bad_share=0.5)
    assert loaded.bad_rows.counts == ({reason: 1} if reason else {})
    assert all(prompt.token_ids == loaded[0].token_ids for prompt in loaded)


def test_cached_tokens_are_found_again_and_never_stale(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = write(tmp_path / "c.jsonl", [chat("q", "a"), {"text": "x"}, chat("q", "c")])
    fresh = conversations(source, cache, max_bad_share=0.5)
    in_memory = conversations(source, max_bad_share=0.5)
    (folder,) = cache.iterdir()
    written = (folder / "examples.arrow").stat().st_mtime_ns
    again = conversations(source, cache, max_bad_share=0.5)
    assert (folder / "examples.arrow").stat().st_mtime_ns == written
    assert list(again) == list(fresh) == list(in_memory)
    assert again.bad_rows == fresh.bad_rows == in_memory.bad_rows
    changed = conversations(write(tmp_path / "c.jsonl", [chat("q", "other")]), cache, max_bad_share=0.5)
    assert len(changed) == 1
    assert len(list(cache.iterdir())) == 2


def test_cached_tokens_are_mapped_not_loaded(tmp_path: Path) -> None:
    loaded = conversations({"type": "sums", "size": 100}, tmp_path)
    assert [Path(file["filename"]).name for file in loaded._examples.cache_files] == ["examples.arrow"]


def test_too_many_bad_rows_leave_no_cache(tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="1 of 1 rows"):
        conversations(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_resumed_run_takes_the_same_examples() -> None:
    source = {"type": "sums", "size": 23}
    whole = [conversations(source, seed=4).take(step, 7) for step in range(1, 11)]
    resumed = conversations(source, seed=4)
    assert [resumed.take(step, 7) for step in range(6, 11)] == whole[5:]
    first_epoch = [example.where for batch in whole for example in batch][:23]
    assert sorted(first_epoch) == sorted(f"sums/train:{number}" for number in range(1, 24))
    assert [example.where for example in conversations(source, seed=5).take(1, 7)] != first_epoch[:7]


def test_prompt_of_a_sum() -> None:
    loaded = prompts({"type": "sums", "size": 3, "split": "held_out"}, reward="sum")
    prompt = loaded[0]
    text = prompt.task.prompt
    assert prompt.token_ids == [1, 3, *(8 + byte for byte in text.encode()), 4]
    first, second = text.removesuffix("=").split("+")
    assert prompt.task.metadata["prompt"] == text
    total = str(int(first) + int(second))
    asked = [{"role": "user", "content": text}]
    row = "sums/held_out:1"
    assert prompt.task == Task(text, total, kind="sum", row=row, metadata=prompt.task.metadata, messages=asked)
    assert [p.task.row for p in loaded.take(2, 2)] == [p.task.row for p in loaded.take(2, 2)]


def test_a_column_says_which_reward_judges() -> None:
    source = {"type": "sums", "size": 40, "shares": {"programs": 0.5}}
    loaded = prompts(source, reward="column:reward")
    assert {prompt.task.kind for prompt in loaded} == {"math", "code"}
    assert all((prompt.task.kind == "code") == prompt.task.prompt.startswith("py ") for prompt in loaded)
    with pytest.raises(ValueError, match=r"40 of 40 rows.* 40 missing field"):
        prompts(source, reward="column:judge")
    with pytest.raises(ValueError, match=r"40 no name .*\n.*\n.*"):
        prompts(source, reward="column:messages")


def test_prompt_forms_and_system_message(tmp_path: Path) -> None:
    user = {"role": "user", "content": "q"}
    turns = [user, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    source = write(tmp_path / "p.jsonl", [{"prompt": "q", "truth": 1}, {"prompt": turns, "truth": "2"}])
    text, dialogue = prompts(source, system="S")
    assert text.token_ids == [1, 5, 8 + ord("S"), 3, 8 + ord("q"), 4]
    assert dialogue.token_ids[-3:] == [3, 8 + ord("r"), 4]
    assert (text.task.prompt, dialogue.task.prompt, text.task.kind) == ("q", "r", "")
    assert (text.task.truth, dialogue.task.truth) == (1, "2")


def test_bad_prompts_are_left_out_and_reported(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "truth": 0},
        {"prompt": "q"},
        {"prompt": "q", "truth": ""},
        {"prompt": " ", "truth": "1"},
        {"prompt": 5, "truth": "1"},
        {"prompt": "long" * 9, "truth": "1"},
        {"prompt": [{"role": "system", "content": "T"}, {"role": "user", "content": "q"}], "truth": "1"},
        {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "truth": "1"},
    ]
    loaded = prompts(write(tmp_path / "p.jsonl", rows), system="S", max_bad_share=0.9, max_prompt_length=20)
    assert [prompt.task.truth for prompt in loaded] == [0]
    assert loaded.bad_rows.counts == {
        "missing field": 1,
        "empty truth": 1,
        "empty user message": 1,
        "not a list of {role, content}": 1,
        "longer than max_prompt_length": 1,
        "roles don't alternate": 1,
        "does not end with the user": 1,
    }
    with pytest.raises(ValueError, match="7 of 8 rows"):
        prompts(write(tmp_path / "p.jsonl", rows), system="S", max_prompt_length=20)


def test_gym_tasks_carry_their_entry_even_without_one_answer() -> None:
    (sums,) = prompts({"type": "reasoning_gym", "task": "chain_sum", "size": 1})
    assert sums.task.metadata["task"] == "chain_sum"
    assert sums.task.truth == sums.task.metadata["entry"]["answer"]
    (coloring,) = prompts({"type": "reasoning_gym", "task": "graph_color", "size": 1}, max_prompt_length=4096)
    assert coloring.task.truth is None
    assert coloring.task.prompt == coloring.task.metadata["entry"]["question"]


def test_the_arguments_of_a_gym_task_reach_its_verifier() -> None:
    source = {"type": "reasoning_gym", "task": "puzzle24", "size": 1, "params": {"max_value": 6}}
    (puzzle,) = prompts(source)
    assert puzzle.task.metadata["params"] == {"max_value": 6}
    assert GymReward().score(puzzle.task, "no idea") == 0.0


def test_rewards_of_form_need_no_truth(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [{"prompt": "q"}])
    assert [prompt.task.truth for prompt in prompts(source, truth=None)] == [None]


@pytest.mark.skipif(not GSM8K.is_file(), reason="shared/data/gsm8k_train.jsonl is not there")
def test_real_rows() -> None:
    source = {"type": "file", "paths": [str(GSM8K)]}
    loaded = prompts(source, prompt="question", truth="answer", max_prompt_length=2048)
    assert len(loaded) > 7000
    assert not loaded.bad_rows.counts
