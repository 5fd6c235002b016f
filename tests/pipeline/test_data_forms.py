"""Data as people have it: rows are recognised by their columns, counted, and shown as the model will see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.data import ComparisonData, ConversationData, FileSource, PromptData
from jobs.cli import main
from pipeline.data.comparisons import read_comparisons
from pipeline.data.conversations import tokenised
from pipeline.data.prompts import Prompts
from pipeline.data.rows import BadRows
from pipeline.models.tokenizer import byte_tokenizer

TURN = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def source(folder: Path, *rows: dict[str, Any]) -> FileSource:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(type="file", paths=[str(file)])


@pytest.mark.parametrize(
    ("row", "text", "form"),
    [
        ({"messages": TURN}, "<|user|>2+2?<|assistant|>4<eos>", None),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, "4<eos>", "convers"),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, "<|user|>Add.\n\n2+2<|assistant|>4<eos>", "Alpaca"),
        ({"instruction": "Add 2.", "input": "", "output": "4"}, "<|user|>Add 2.<|assistant|>4<eos>", "Alpaca"),
        (
            {"system": "S", "history": [["a", "b"]], "instruction": "c", "output": "d"},
            "<|system|>S<|user|>a<|assistant|>b<eos><|user|>c<|assistant|>d<eos>",
            "Alpaca",
        ),
        ({"prompt": "2+2?", "completion": "4"}, "<|user|>2+2?<|assistant|>4<eos>", "'prompt'"),
        ({"prompt": TURN[:1], "completion": TURN[1:]}, "<|user|>2+2?<|assistant|>4<eos>", "'prompt'"),
        ({"question": "2+2?", "answer": "4"}, "<|user|>2+2?<|assistant|>4<eos>", "'question'"),
    ],
)
def test_conversations_are_recognised_by_their_columns(
    row: dict[str, Any], text: str, form: str | None, tmp_path: Path
) -> None:
    bad_rows, tokenizer = BadRows(), byte_tokenizer()
    [example] = tokenised(ConversationData(source=source(tmp_path, row)), tokenizer, bad_rows)
    assert str(tokenizer.decode(example.token_ids)).endswith(text)
    assert form is None or ("1 of 1 rows are read as" in bad_rows.summary() and form in bad_rows.summary())
    assert BadRows.from_state(bad_rows.state()).forms == bad_rows.forms


def test_another_form_is_refused_with_the_settings_that_read_it(tmp_path: Path) -> None:
    bad_rows = BadRows()
    config = ConversationData(source=source(tmp_path, {"q": "2+2?", "a": "4"}, {"chosen": "x", "rejected": "y"}))
    assert not list(tokenised(config, byte_tokenizer(), bad_rows))
    assert (
        "['a', 'q']; name the column of the conversation" in bad_rows.summary()
        and "data.prompt and data.answer" in bad_rows.summary()
    )


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "pair"),
        ({"prompt": TURN[:1], "chosen": TURN[1:], "rejected": [TURN[1] | {"content": "5"}]}, "pair"),
        ({"chosen": TURN, "rejected": [TURN[0], TURN[1] | {"content": "5"}]}, "pair"),
        ({"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}, "dialogue"),
    ],
)
def test_preferences_of_trl_openrlhf_and_hh_are_recognised(row: dict[str, Any], form: str, tmp_path: Path) -> None:
    bad_rows = BadRows()
    [comparison] = read_comparisons(ComparisonData(source=source(tmp_path, row)), bad_rows)
    assert (comparison.messages, comparison.answers) == (TURN[:1], ["4", "5"])
    assert f"1 of 1 rows are read as comparisons of the form '{form}'" in bad_rows.summary()


def test_verls_rows_give_their_truth(tmp_path: Path) -> None:
    row = {"prompt": TURN[:1], "data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "4"}}
    [prompt] = Prompts.load(PromptData(source=source(tmp_path, row)), byte_tokenizer())
    assert prompt.task.truth == "4"


SFT = """
type: sft
model: {init_config: tiny}
data: {source: {type: sums, size: 8}, max_length: 64}
conversations_per_step: 1
steps: 1
optimizer: {learning_rate: 1e-3}
"""


def test_rows_are_shown_with_what_is_trained_on_and_what_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": TURN}, {"instruction": "x" * 99, "output": "y"}, {"prompt": "3+1?", "completion": "4\x1b[2J"}]
    [file] = source(tmp_path, *rows).paths
    (tmp_path / "sft.yaml").write_text(SFT)
    page = tmp_path / "rows.html"
    assert main(["data", "show", file, "--config", str(tmp_path / "sft.yaml"), "--page", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "<|user|>2+2?<|assistant|>[[4<eos>]]" in shown and "2 of them trained on" in shown
    assert "longer than max_length" in shown and "2 good rows" in shown and "\x1b[2J" not in shown
    assert "2+2?" in page.read_text() and "Alpaca" in page.read_text()
    assert main(["data", "show", file, "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "assistant: 4" in shown and "3 good rows" in shown and "Alpaca" in shown
