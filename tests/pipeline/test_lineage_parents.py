"""Parents and inputs of a stage: found anywhere in its settings, refused where they do not fit, checked for changes."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from configs.reward_model import RewardModelConfig
from configs.stages import Recipe
from pipeline.disk import hashes
from pipeline.disk.hashes import checkpoint_hashes, file_hash
from pipeline.disk.recorded import changes
from pipeline.run.lineage import ValidationGate, check_lineage, write_lineage
from pipeline.run.stage import resolve_gate
from tests.pipeline.stage_configs import SUMS, check, gate, grpo, make_checkpoint, pairs, read, rm, sft, stage, start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


def test_every_stage_names_its_models_data_and_parents(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    tuned = stage(run, "sft", sft(model))
    start(run / "pairs", "pairs", sft(model))  # any stage: what counts is the data beside its lineage
    data = {"source": {"type": "dataset", "paths": [str(pairs(run / "pairs" / "data"))]}}
    judge = stage(run, "rm", rm(tuned, data=data), "LlamaForSequenceClassification")
    lineage = read(run / "rm", "lineage.json")
    assert [(parent["key"], parent["folder"]) for parent in lineage["parents"]] == [
        ("model.path", "../sft"),
        ("data.source.paths.0", "../pairs"),
    ]
    rows = run / "pairs" / "data" / "train" / "data-00000-of-00001.arrow"
    assert lineage["data"]["data.source"]["../pairs/data/train/data-00000-of-00001.arrow"] == file_hash(rows)
    args = {"path": str(judge), "meta": {"path": str(judge)}}  # as a self_judge has it
    rewards = [{"name": "math"}, {"name": "length", "label": "helpful", "args": args}]
    start(run / "reason", "reason", grpo(tuned, rewards=rewards))
    lineage = read(run / "reason", "lineage.json")
    assert {key: described["head"] for key, described in lineage["models"].items()} == {
        "model": "LlamaForCausalLM",
        "rewards.1.args": "LlamaForSequenceClassification",
        "rewards.1.args.meta": "LlamaForSequenceClassification",
    }
    assert [(parent["key"], parent["folder"]) for parent in lineage["parents"]] == [
        ("model.path", "../sft"),
        ("rewards.1.args.path", "../rm"),
        ("rewards.1.args.meta.path", "../rm"),
    ]


def test_other_rows_in_a_data_set_are_named(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    config = rm(model, data={"source": {"type": "dataset", "paths": [str(pairs(run / "pairs" / "data"))]}})
    start(run / "rm", "rm", config)
    pairs(run / "pairs" / "data")
    check(run / "rm", config)  # the same rows, made again
    pairs(run / "pairs" / "data", answer="two")
    with pytest.raises(ValueError, match=r"changed since: data data\.source\.\.\./pairs/data/train/data-00000"):
        check(run / "rm", config)


def test_behind_a_gate_stands_what_it_let_through(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    parent = stage(run, "sft", sft(model))
    candidate = stage(run, "reason", grpo(parent))
    start(run / "gate", "gate", gate(candidate, parent))
    assert [(each["key"], each["folder"]) for each in read(run / "gate", "lineage.json")["parents"]] == [
        ("candidate.path", "../reason"),
        ("parent.path", "../sft"),
    ]
    (run / "gate" / "hf").symlink_to("../reason/hf")
    child = grpo(run / "gate" / "hf")
    start(run / "prefer", "prefer", child)
    [recorded] = read(run / "prefer", "lineage.json")["parents"]
    assert (recorded["key"], recorded["folder"]) == ("model.path", "../gate")
    save_file({"weight": np.ones(3, dtype=np.float32)}, parent / "model.safetensors")
    (run / "gate" / "hf").unlink()
    (run / "gate" / "hf").symlink_to("../sft/hf")  # decided anew: rolled back
    with pytest.raises(ValueError, match=r"models model\.files\.model\.safetensors"):
        check(run / "prefer", child)


def test_what_a_stage_is_validated_by_is_part_of_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate in a file, the data of its suites, and the reward model that judges them."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    judge = stage(run, "rm", rm(model, data={"source": SUMS}), "LlamaForSequenceClassification")
    (tmp_path / "asked.jsonl").write_text("{}\n")
    source = {"type": "file", "paths": ["asked.jsonl"]}
    reward = {"name": "reward_model", "args": {"path": "stage:rm"}}
    task = {"type": "task", "prompts": {"source": source}, "reward": reward}
    settings = gate(model, model).model_dump() | {"suites": {"own": task}}
    settings |= {"rules": [{"type": "improve", "figure": "own/score_mean"}]}
    Path("gate.yaml").write_text(yaml.safe_dump(settings))
    recipe = Recipe.model_validate({"name": "run", "stages": {"rm": rm(model, data={"source": SUMS}).model_dump()}})
    config = grpo(model, validation={"gate": "gate.yaml", "every_steps": 1})

    def by() -> ValidationGate | None:
        return resolve_gate(config, run / "reason", recipe)

    write_lineage(run / "reason", "reason", config, config, by())
    (run / "reason" / "metrics.jsonl").write_text('{"step": 1}\n')
    lineage = read(run / "reason", "lineage.json")
    assert set(lineage["data"]) == {
        "prompts.source",
        "validation.gate",
        "validation.gate.suites.own.prompts.source",
    }
    assert lineage["models"]["validation.gate.suites.own.reward.args"]["folder"] == "../rm/hf"
    assert {"key": "validation.gate.suites.own.reward.args.path", "folder": "../rm"}.items() <= lineage["parents"][
        -1
    ].items()
    Path("gate.yaml").write_text(yaml.safe_dump(settings | {"on_failure": "roll_back", "confidence": 0.9}))
    check_lineage(run / "reason", config, config, by())  # which step is best doesn't depend on these
    for changed in ({"seed": 1}, {"suites": {"own": task | {"samples": 2}}}):
        Path("gate.yaml").write_text(yaml.safe_dump(settings | changed))
        with pytest.raises(ValueError, match=r"changed since: data validation\.gate\. Restore"):
            check_lineage(run / "reason", config, config, by())
    Path("gate.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "asked.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"data validation\.gate\.suites\.own\.prompts\.source\..*asked\.jsonl"):
        check_lineage(run / "reason", config, config, by())
    (tmp_path / "asked.jsonl").write_text("{}\n")
    save_file({"weight": np.ones(3, dtype=np.float32)}, judge / "model.safetensors")
    with pytest.raises(ValueError, match=r"models validation\.gate\.suites\.own\.reward\.args\.files"):
        check_lineage(run / "reason", config, config, by())


def test_the_best_checkpoint_has_its_stage_as_parent(tmp_path: Path, model: Path) -> None:
    stage(tmp_path / "run", "reason", grpo(model))
    best = make_checkpoint(tmp_path / "run" / "reason" / "best" / "hf")
    start(tmp_path / "run" / "eval", "eval", sft(best))
    assert read(tmp_path / "run" / "eval", "lineage.json")["parents"][0]["folder"] == "../reason"


def test_a_head_that_does_not_fit_is_refused_naming_both(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    judge = stage(run, "rm", rm(model, data={"source": SUMS}), "LlamaForSequenceClassification")
    message = (
        r"model='.*rm/hf' is a reward model \(LlamaForSequenceClassification, .*'rm'"
        r".* grpo needs a language model"
    )
    with pytest.raises(ValueError, match=message):
        start(run / "reason", "reason", grpo(judge))
    tuned = stage(run, "sft", sft(model))
    rewards = [{"name": "reward_model", "label": "helpful", "args": {"path": str(tuned)}}]
    with pytest.raises(ValueError, match=r"rewards\.0\.args='.*sft/hf' is a language model"):
        start(run / "prefer", "prefer", grpo(tuned, rewards=rewards))
    start(run / "rm2", "rm2", rm(judge, data={"source": SUMS}))  # a reward model may be trained further


def test_a_reward_model_of_another_language_is_refused(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    judge = stage(run, "rm", rm(model, data={"source": SUMS}), "LlamaForSequenceClassification")
    make_checkpoint(judge, template="{{ messages }}", architecture="LlamaForSequenceClassification")
    rewards = [{"name": "reward_model", "label": "helpful", "args": {"path": str(judge)}}]
    with pytest.raises(ValueError, match=r"rewards\.0\.args='.*rm/hf': its chat_template"):
        start(run / "prefer", "prefer", grpo(model, rewards=rewards))


def test_a_run_can_be_moved(tmp_path: Path, model: Path) -> None:
    def config(run: Path) -> RewardModelConfig:
        return rm(run / "sft" / "hf", data={"source": {"type": "dataset", "paths": [str(run / "pairs" / "data")]}})

    run = tmp_path / "run"
    stage(run, "sft", sft(model))
    pairs(run / "pairs" / "data")
    recorded = rm(Path("stage:sft"), data={"source": {"type": "dataset", "paths": ["stage:pairs"]}})
    write_lineage(run / "rm", "rm", recorded, config(run))
    moved = run.rename(tmp_path / "moved")
    check_lineage(moved / "rm", recorded, config(moved))


def test_what_was_given_from_the_working_folder_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "here" / "base")
    (tmp_path / "here" / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "here")
    config = sft(Path("base"), data={"source": {"type": "file", "paths": ["rows.jsonl"]}})
    start(Path("runs", "one", "sft"), "sft", config)
    monkeypatch.chdir(tmp_path)
    assert changes(tmp_path / "here" / "runs" / "one" / "sft", content=True) == []
    monkeypatch.chdir((tmp_path / "here").rename(tmp_path / "there"))
    check(Path("runs", "one", "sft"), config)


def test_what_changed_since_is_told(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    tuned = stage(run, "sft", sft(model))
    text = tmp_path / "rows.jsonl"
    text.write_text("{}\n")
    start(run / "reason", "reason", sft(tuned, data={"source": {"type": "file", "paths": [str(text)]}}))
    assert changes(run / "reason", content=True) == []
    save_file({"weight": np.ones(3, np.float32)}, tuned / "model.safetensors")
    text.write_text("[]\n")
    assert changes(run / "reason", content=False) == []
    assert changes(run / "reason", content=True) == [
        "model: model.safetensors is not what it was",
        f"data.source: {text} is not what it was",
    ]
    for name in ("lineage.json", "metrics.jsonl"):
        (run / "sft" / name).unlink()
    assert changes(run / "reason", content=False) == ["model.path: ../sft is gone"]
    start(run / "sft", "sft", sft(model, seed=5))
    assert changes(run / "reason", content=False) == ["model.path: ../sft was run again since"]


def test_hashes_of_large_files_are_remembered_and_never_wrong(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "LARGE", 1)
    weights = model / "model.safetensors"
    assert checkpoint_hashes(model)["model.safetensors"] == file_hash(weights)
    assert not (model / ".sha256.json").exists(), "changed a moment ago, it may change again unseen"
    for file in model.iterdir():
        os.utime(file, (1, 1))
    assert checkpoint_hashes(model)["model.safetensors"] == file_hash(weights)
    read_again = hashes.file_hash
    monkeypatch.setattr(hashes, "file_hash", lambda file: pytest.fail(f"{file} was read again"))
    remembered = checkpoint_hashes(model)
    monkeypatch.setattr(hashes, "file_hash", read_again)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert checkpoint_hashes(model)["model.safetensors"] == file_hash(weights) != remembered["model.safetensors"]
