from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from configs.environment import variables_of
from configs.evaluation import EvalConfig
from configs.grpo import GRPOConfig
from configs.load import find_config, leaves, load_config
from configs.sample import SampleConfig
from configs.sft import SFTConfig
from configs.stages import STAGES, Recipe
from configs.visible import visible
from tests.pipeline.stage_configs import grpo

RECIPE = str(Path(__file__).parent / "recipe.yaml")

NEVER_WARM = {"type": "constant", "warmup_steps": 9}
NAMED = {"source": {"type": "sums", "size": 8}, "max_prompt_length": 16, "reward": "math"}
VERDICTS = {
    "type": "verdicts",
    "data": {"source": {"type": "sums", "size": 8}},
    "judge": {"rubric": "{prompt} {answers}: [[7, 3]]", "compare": 2},
}
MORE = {"programs": 0.8, "requests": 0.3}
TWO = [{"name": "math"}, {"name": "my.py:polite"}]


def stage_file(folder: Path, stage: str) -> Path:
    """A configuration of one stage, cut out of the fixture."""
    data: Any = OmegaConf.to_container(OmegaConf.load(RECIPE), resolve=True)
    file = folder / f"{stage}.yaml"
    OmegaConf.save(OmegaConf.create(data["stages"][stage]), file)
    return file


def refusal(*overrides: str, path: str = RECIPE, model: Any = Recipe) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides, model)
    return str(caught.value)


def test_values_reach_the_model_with_their_types() -> None:
    recipe = load_config(
        RECIPE, ["stages.warm.optimizer.learning_rate=1e-5", "stages.reason.rewards.0.weight=2"], Recipe
    ).config
    warm, reason, judge = recipe.stages.values()
    assert isinstance(warm, SFTConfig) and isinstance(reason, GRPOConfig) and isinstance(judge, EvalConfig)
    assert warm.optimizer.learning_rate == 1e-5
    assert reason.optimizer.learning_rate == 3e-4
    assert reason.rewards[0].weight == 2.0
    assert judge.sampling == reason.sampling
    assert list(recipe.stages) == ["warm", "reason", "judge"]


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    file = stage_file(tmp_path, "warm")
    file.write_text(file.read_text().replace("learning_rate: 0.002", "learning_rate: 1e-5"))
    assert load_config(str(file), [], SFTConfig).config.optimizer.learning_rate == 1e-5


MISREAD = [
    *("010", "-007", "00", "08", "1:30", "-1:30:00", "1:30.5", "1_", "1__0", ".5e3", "-.5", "+.5", "0o17", "0X10"),
    *("yes", "No", "ON", "off", "None"),
]


@pytest.mark.parametrize("written", MISREAD)
def test_a_value_that_yaml_reads_otherwise_than_it_looks_is_refused(tmp_path: Path, written: str) -> None:
    key = "stages.warm.data.source.size"
    assert f"override '{key}={written}': {key}: {written} " in refusal(f"{key}={written}")
    assert f"{key}.a.1: {written} " in refusal(f"{key}={{a: [1, {written}]}}")
    file = tmp_path / "recipe.yaml"
    file.write_text(Path(RECIPE).read_text() + f"extra:\n  - far: {{down: [x, {written}]}}\n")
    assert f"  extra.0.far.down.1: {written} " in refusal(path=str(file))
    file.write_text(Path(RECIPE).read_text() + f"{written}: 1\n")
    assert f"  {written}: {written} " in refusal(path=str(file))
    for quoted in (f"'{written}'", f'"{written}"'):
        recipe = load_config(RECIPE, [f"stages.warm.data.messages={quoted}"], Recipe).config
        assert recipe.stages["warm"].data.messages == written


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1_000", 1000), ("0x10", 16), ("0b11", 3), ("+7", 7), ("7", 7)],
)
def test_whole_numbers_mean_what_they_look_like(written: str, meant: int) -> None:
    assert load_config(RECIPE, [f"stages.warm.steps={written}"], Recipe).config.stages["warm"].steps == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-5", 1e-5), (".5", 0.5), ("5.e-3", 5e-3), ("2E-3", 2e-3), ("1_0.5", 10.5), ("00.5", 0.5), ("+0.1", 0.1)],
)
def test_decimals_mean_what_they_look_like(written: str, meant: float) -> None:
    key = "stages.warm.optimizer.learning_rate"
    assert load_config(RECIPE, [f"{key}={written}"], Recipe).config.stages["warm"].optimizer.learning_rate == meant


@pytest.mark.parametrize("written", ["2024-01-01", "12:70", "7b", "1.2.3", "a:1", "3:4:x", "none", "y", "1,000", "~/x"])
def test_text_that_begins_like_a_number_stays_text(written: str) -> None:
    recipe = load_config(RECIPE, [f"stages.warm.data.messages={written}"], Recipe).config
    assert recipe.stages["warm"].data.messages == written


@pytest.mark.parametrize("written", ["1e3", "2.0", "1e999"])
def test_a_decimal_is_no_whole_number(written: str) -> None:
    assert "stages.warm.steps: Input should be a valid integer" in refusal(f"stages.warm.steps={written}")


def test_every_leaf_has_its_origin() -> None:
    loaded = load_config(RECIPE, ["stages.reason.steps=3", "stages.warm.optimizer.betas=[0.8, 0.9]"], Recipe)
    assert set(loaded.origins) == {key for key, _ in leaves(loaded.config.model_dump())}
    assert loaded.origins["stages.reason.steps"] == "override"
    assert loaded.origins["stages.warm.optimizer.betas"] == "override"
    assert loaded.origins["stages.warm.optimizer.learning_rate"] == "recipe.yaml"
    assert loaded.origins["stages.reason.rewards.0.name"] == "recipe.yaml"
    assert loaded.origins["stages.judge.sampling.max_tokens"] == "recipe.yaml"
    assert loaded.origins["stages.reason.rewards.0.weight"] == "default"
    assert loaded.origins["stages.warm.trainer.num_ranks"] == "default"


def test_an_override_replaces_a_whole_block() -> None:
    loaded = load_config(RECIPE, ["stages.reason.optimizer.schedule={type: constant, warmup_steps: 5}"], Recipe)
    assert loaded.config.stages["reason"].model_dump()["optimizer"]["schedule"] == {
        "type": "constant",
        "warmup_steps": 5,
    }
    assert loaded.origins["stages.reason.optimizer.schedule.warmup_steps"] == "override"


def test_later_overrides_win_and_see_earlier_ones() -> None:
    overrides = [
        "stages.reason.optimizer.schedule.type=constant",
        "stages.reason.steps=3",
        "stages.reason.steps=${stages.warm.steps}",
    ]
    reason = load_config(RECIPE, overrides, Recipe).config.stages["reason"]
    assert isinstance(reason, GRPOConfig)
    assert (reason.steps, reason.optimizer.schedule.type) == (20, "constant")


def test_brackets_and_dots_name_the_same_entry() -> None:
    keys = ("rewards[0].name", "rewards.0.name")
    bracketed, dotted = (load_config(RECIPE, [f"stages.reason.{key}=gym"], Recipe) for key in keys)
    assert bracketed == dotted


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stages.reason.stepz=3", "override 'stages.reason.stepz=3': unknown key 'stepz': did you mean 'steps'?"),
        ("stages.reson.steps=3", "override 'stages.reson.steps=3': unknown key 'reson': did you mean 'reason'?"),
        ("stages.reason.rewards.1.weight=3", "unknown key '1': known: 0"),
        ("stages.judge.suites.heldout.pass_score=0", "unknown key 'heldout': did you mean 'held_out'?"),
        ("stages.judge.rollout.max_model_len=3", "stands below the value '${stages.reason.rollout}'"),
        ("stages.reason.steps", "write key=value"),
        ("stages..steps=3", "write key=value"),
        ("stages.reason.rewards=[1", "not valid YAML"),
        ("stages.reason.steps=fast", "stages.reason.steps: Input should be a valid integer"),
        ("stages.reason.steps=2.0", "(given: 2.0) [override stages.reason.steps=2.0]"),
        (
            "stages.reason.optimizer.learning_rate=true",
            "stages.reason.optimizer.learning_rate: Input should be a valid",
        ),
        (
            "stages.warm.epochs=1",
            "stages.warm: set exactly one of 'steps' and 'epochs' [override stages.warm.epochs=1]",
        ),
        ("stages.reason.model.path=stage:judge", "no earlier stage 'judge'; earlier stages: ['warm']"),
        ("stages.reason.type=grop", "stages.reason: unknown type 'grop': did you mean 'grpo'?"),
        (
            "stages.reason.optimizer.schedule={type: cosine, final: 1}",
            "schedule.final: unknown key 'final': did you mean 'final_",
        ),
        (
            "stages.reason.optimizer.schedule={warmup_steps: 1}",
            "stages.reason.optimizer.schedule: its 'type' is missing",
        ),
        (
            "stages.reason.steps=${stages.warm.stps}",
            "stages.reason.steps: Interpolation key 'stages.warm.stps' not found",
        ),
        ("stages.reason.steps=???", "stages.reason.steps: Missing mandatory value"),
        ("name=a/b", "name: String should match pattern"),
    ],
)
def test_a_wrong_override_is_refused_readably(override: str, complaint: str) -> None:
    assert complaint in refusal(override)


def test_all_problems_are_told_at_once_and_by_the_keys_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    text = Path(RECIPE).read_text().replace("learning_rate: 2e-3", "learning_rat: 2e-3\n      moment: 1")
    file.write_text(text.replace("warmup_steps: 2", "warmup_steps: -2").replace("    group_size: 8\n", ""))
    lines = refusal(path=str(file)).splitlines()
    assert lines[0] == f"{file}: not a valid configuration"
    assert sorted(lines[1:]) == [
        "  stages.reason.group_size: missing, and it has no default",
        "  stages.reason.optimizer.schedule.warmup_steps: Input should be greater than or equal to 0 (given: -2)",
        "  stages.warm.optimizer.learning_rat: unknown key 'learning_rat': did you mean 'learning_rate'?",
        "  stages.warm.optimizer.moment: unknown key 'moment': did you mean 'moments'?",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"- 1\n", "holds a list"),
        (b"a: [1\n", "not valid YAML"),
        (b"name: a\nname: b\n", "found duplicate key name"),
        (b"name: \xff\n", "not UTF-8"),
        (b"name: ${\n", "name: "),
        (b"", "name: missing, and it has no default"),
        (b"just words\n", "unknown key 'just words'"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: bytes, complaint: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(text)
    message = refusal(path=str(file))
    assert message.startswith(str(file)) and complaint in message


def test_a_missing_file_names_what_is_shipped() -> None:
    assert "neither a file nor a shipped recipe; shipped recipes: " in refusal(path="no_such_recipe")


def test_a_single_stage_must_be_of_the_asked_type(tmp_path: Path) -> None:
    file = stage_file(tmp_path, "warm")
    assert load_config(str(file), ["seed=3"], SFTConfig).config.seed == 3
    wrong = refusal(path=str(file), model=GRPOConfig)
    assert wrong == f"{file}: a stage of type 'sft' where a stage of type 'grpo' is wanted"
    assert refusal(path=str(file)) == f"{file}: a stage of type 'sft' where a recipe, without 'type', is wanted"
    assert "a recipe, without 'type', where a stage of type 'sft' is wanted" in refusal(model=SFTConfig)


def test_a_file_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("name: mine\n")
    assert find_config("demo") == Path("demo")


BF16 = {"path": "x", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("grpo", {"group_size": 1}, "group_size"),
        ("grpo", {"sampling": {"max_tokens": 8, "temperature": 0}}, "same completion in the whole group"),
        ("grpo", {"prompts_per_step": 3, "updates_per_batch": 2}, "multiple of updates_per_batch"),
        ("grpo", {"trainer": {"num_ranks": 3}}, "multiple of trainer.num_ranks"),
        ("grpo", {"sampling": {"max_tokens": 60}}, r"rollout\.max_model_len"),
        ("grpo", {"rewards": [{"name": "math"}, {"name": "math"}]}, "may appear once"),
        ("grpo", {"rewards": [{"name": "math", "weight": 0.0}]}, "nothing would be"),
        ("grpo", {"objective": {"surrogate": "cispo"}}, "updates_per_batch=1"),
        ("grpo", {"routing_replay": "policy"}, "updates_per_batch=1"),
        ("grpo", {"split": "completions"}, "updates_per_batch=1"),
        ("grpo", {"model": BF16, "sync": {"max_mean_gap": 1e-5}}, "is for float32"),
        ("grpo", {"overlong": {"shaping_tokens": 8}}, r"sampling\.max_tokens"),
        ("grpo", {"rewards": [{"name": "a.py:f"}, {"name": "trl:b.py:f"}]}, r"got \['f', 'f'\]"),
        ("grpo", {"rewards": [{"name": "math", "gate": 0.5}]}, "single reward"),
        ("grpo", {"mixing": "group"}, "single reward"),
        ("grpo", {"mixing": "group", "overlong": {"shaping_tokens": 4}, "rewards": TWO}, "reward `length`"),
        ("grpo", {"reward_pool": {"workers": {"rule": 0}}}, "greater than or equal to 1"),
        ("grpo", {"rewards": [{"name": "math", "weight": float("nan")}]}, "finite"),
        ("grpo", {"rewards": TWO, "prompts": NAMED}, "'polite' has no effect"),
        ("grpo", {"seed": -1}, "greater than or equal to 0"),
        ("eval", {"sampling": {"max_tokens": 8, "temperature": 0}}, "repeats the greedy"),
        ("eval", {"sampling": {"max_tokens": 64}}, "no room for a prompt"),
        ("eval", {"suites": {"t": {"type": "text", "path": "t.txt", "window_tokens": 64}}}, "must be smaller than"),
        ("grpo", {"prompts": {"source": {"type": "sums", "size": 8}, "max_prompt_length": 57}}, r"=57 .*exceeds"),
        ("sft", {"data": {"source": {"type": "sums", "size": 8, "shares": MORE}}}, r"0\.8.*0\.3"),
        ("sft", {"data": {"source": {"type": "sums", "size": 8, "shares": {"lies": 1.0}}}}, "'programs', 'requests'"),
        ("sft", {"data": {"source": {"type": "sums", "size": 8, "shares": {"programs": 1.1}}}}, "less than or equal"),
        ("sft", {"steps": 5, "epochs": 1}, "exactly one"),
        ("sft", {"eval_every_steps": 2}, "no effect without eval_data"),
        ("sft", {"conversations_per_step": 3, "trainer": {"num_ranks": 2}}, "multiple of"),
        ("sft", {"optimizer": {"learning_rate": 1.0, "schedule": NEVER_WARM}}, "never ends"),
    ],
)
def test_an_impossible_combination_is_refused_with_its_reason(stage: str, changes: dict, message: str) -> None:
    source = {"source": {"type": "sums", "size": 8}}
    stages: dict = {
        "sft": {"data": source, "conversations_per_step": 4, "steps": 5, "optimizer": {"learning_rate": 1e-3}},
        "grpo": {
            "prompts": source | {"max_prompt_length": 16},
            "rewards": [{"name": "math"}],
            "steps": 2,
            "prompts_per_step": 4,
            "group_size": 2,
            "sampling": {"max_tokens": 8},
            "optimizer": {"learning_rate": 1e-3},
            "rollout": {"max_model_len": 64},
        },
        "eval": {
            "suites": {"s": {"type": "task", "prompts": source, "reward": {"name": "math"}}},
            "sampling": {"max_tokens": 8},
            "rollout": {"max_model_len": 64},
        },
    }
    config = {"type": stage, "model": {"path": "x"}} | stages[stage]
    STAGES[stage].model_validate(config)
    with pytest.raises(ValidationError, match=message):
        STAGES[stage].model_validate(config | changes)


def test_a_default_that_nobody_set_adapts_to_a_small_model() -> None:
    source, small = {"source": {"type": "sums", "size": 8}}, {"max_model_len": 64}
    base = {"sampling": {"max_tokens": 8}, "rollout": small, "model": {"path": "x"}}
    suites = {"t": {"type": "text", "path": "t.txt"}, "h": {"type": "lm_eval", "task": "t.yaml"}, "v": VERDICTS}
    evaluation = EvalConfig.model_validate({"type": "eval", "suites": suites} | base)
    lengths = [suite.longest() or suite.longest_prompt() for suite in evaluation.suites.values()]
    assert lengths == [("window_tokens", 63), ("window_tokens", 63), ("max_prompt_length", 56)]
    domains = {"math": {"prompts": source}}
    sample = SampleConfig.model_validate({"type": "sample", "domains": domains} | base)
    assert sample.domains["math"].prompts.max_prompt_length == 56
    assert EvalConfig.model_validate(evaluation.model_dump()) == evaluation, "a record of it is read as it was"


@pytest.mark.parametrize("key", ["trainer.fp8", "rollout.fp8"])
def test_fp8_wants_both_bounds_of_a_sync(key: str) -> None:
    on = {"trainer": {"fp8": True}, "rollout": {"max_model_len": 32, "fp8": ["weights"]}}
    block = key.removesuffix(".fp8")
    plain = grpo(Path("x")).model_dump(exclude_unset=True) | {"model": BF16}
    GRPOConfig.model_validate(plain)  # without FP8 they are measured
    GRPOConfig.model_validate(plain | {block: on[block]} | {"sync": {"max_mean_gap": 0.1, "max_gap": 2.0}})
    for given in ({}, {"max_mean_gap": 0.1}, {"max_gap": 2.0}):
        with pytest.raises(ValidationError, match=f"must be given with {key}"):
            GRPOConfig.model_validate(plain | {block: on[block]} | {"sync": given})


@pytest.mark.parametrize(
    ("value", "is_refused"),
    [
        ("${oc.env:JUDGE_API_KEY}", True),
        ("Bearer ${oc.env:hf_token,none}", True),
        ("${oc.env:DB_PASSWORD}", True),
        ("${oc.env:MODEL_FOLDER}", False),
        ("JUDGE_API_KEY", False),
    ],
)
def test_a_recipe_records_no_key_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, is_refused: bool
) -> None:
    for name in ("JUDGE_API_KEY", "hf_token", "DB_PASSWORD", "MODEL_FOLDER"):
        monkeypatch.setenv(name, "sesame")
    overrides = ["rewards=[{name: judge, args: {header: '" + value + "'}}]"]
    file = str(stage_file(tmp_path, "reason"))
    if is_refused:
        with pytest.raises(ValueError, match=r"rewards\.0\.args\.header.* would be recorded.*api_key_env") as refusal:
            load_config(file, overrides, GRPOConfig)
        assert "sesame" not in str(refusal.value)
    else:
        load_config(file, overrides, GRPOConfig)


def test_a_variable_of_the_environment_is_used_by_value_and_recorded_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("configs.visible._HIDDEN_VALUES", {})
    monkeypatch.setenv("MODEL_FOLDER", "/data/models")
    monkeypatch.setenv("NUMBER_OF_STEPS", "7")
    monkeypatch.delenv("JUDGE_HOST", raising=False)
    url = "http://${oc.env:JUDGE_HOST,localhost}/v1"
    overrides = [
        "stages.warm.steps=${oc.decode:${oc.env:NUMBER_OF_STEPS}}",
        "stages.reason.steps=${stages.warm.steps}",
        "stages.reason.model={path: '${oc.env:MODEL_FOLDER}/tiny'}",
        "stages.reason.rewards=[{name: judge, args: {url: '" + url + "', model: x}}, {name: math}]",
    ]
    recipe = load_config(RECIPE, overrides, Recipe).config
    warm, reason = recipe.stages["warm"], recipe.stages["reason"]
    assert isinstance(warm, SFTConfig) and isinstance(reason, GRPOConfig)
    assert (warm.steps, reason.steps, reason.model.path) == (7, 7, "/data/models/tiny")
    assert reason.rewards[0].args["url"] == "http://localhost/v1"
    record = recipe.model_dump_json()
    assert "/data/models" not in record and "localhost" in record  # as the default is written
    assert record.count("${oc.decode:${oc.env:NUMBER_OF_STEPS}}") == 2 and url in record
    assert variables_of(record) == {"NUMBER_OF_STEPS": "7", "MODEL_FOLDER": "/data/models"}
    assert Recipe.model_validate_json(record) == recipe, "another process reads its own environment"
    assert visible("no '/data/models/tiny', step 7") == "no '${oc.env:MODEL_FOLDER}/tiny', step 7"
    monkeypatch.delenv("MODEL_FOLDER")
    with pytest.raises(ValueError, match=r"stages\.reason\.model.*MODEL_FOLDER.*set the variable"):
        load_config(RECIPE, overrides, Recipe)
