"""Unknown keys: each is answered with the key that was meant, ours or another library's."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from configs import foreign
from configs.keys import tree_keys
from configs.load import load_config
from configs.stages import STAGES, Recipe

RECIPE = str(Path(__file__).parent / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("learning_rate=1e-5", "it is optimizer.learning_rate here"),
        ("temperature=0.5", "it is sampling.temperature here"),
        ("sampling.group_size=4", "it is group_size here"),
        ("optimizer.max_prompt_lenght=4", "did you mean 'prompts.max_prompt_length'?"),
        ("num_generations=8", "TRL's num_generations is group_size here"),
        ("logging_steps=5", "TRL's logging_steps needs no key here"),
        ("beta=0.1", "TRL's beta is objective.kl_coef here"),
        ("per_device_train_batch_size=4", "is prompts_per_step here"),
        ("kl_loss_coef=0.1", "verl's actor_rollout_ref.actor.kl_loss_coef is objective.kl_coef here"),
        ("rollout.n=4", "verl's actor_rollout_ref.rollout.n is group_size here"),
        ("actor_rollout_ref.rollout.n=4", "is group_size here"),
        ("rollout.n_samples_per_prompt=4", "OpenRLHF's rollout.n_samples_per_prompt is group_size here"),
        ("stepz=4", "did you mean 'steps'?"),
    ],
)
def test_an_unknown_key_is_sought_in_the_whole_stage_and_among_other_libraries_names(
    override: str, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(advice)):
        load_config(RECIPE, [f"stages.reason.{override}"], Recipe)
    key, _, value = override.partition("=")  # the same in a file
    tree = OmegaConf.load(RECIPE)
    OmegaConf.update(tree, f"stages.reason.{key}", value)
    file = tmp_path / "recipe.yaml"
    OmegaConf.save(tree, file)
    with pytest.raises(ValueError, match=re.escape(advice)) as refused:
        load_config(str(file), [], Recipe)
    assert f"stages.reason.{key}: " in str(refused.value)


def test_a_block_of_another_library_is_answered_key_by_key_beside_other_faults(tmp_path: Path) -> None:
    tree = OmegaConf.load(RECIPE)
    block: Any = {"actor": {"optim": {"lr": 1e-6}, "use_kl_loss": True}, "rollout": {"n": 8}}
    OmegaConf.update(tree, "stages.reason.actor_rollout_ref", block)
    OmegaConf.update(tree, "stages.warm.steps", 0)
    file = tmp_path / "recipe.yaml"
    OmegaConf.save(tree, file)
    with pytest.raises(ValueError, match=r"actor\.optim\.lr is optimizer\.learning_rate here") as refused:
        load_config(str(file), [], Recipe)
    lines = str(refused.value).splitlines()[1:]
    assert len(lines) == 4 and sum("here" in line for line in lines) == 3 and "stages.warm" in lines[-1]


def test_the_page_for_users_of_other_libraries_is_made_from_the_table_and_names_real_keys() -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")
    assert page == foreign.page(), "python -m configs.foreign docs/coming_from.md"
    keys = {key for stage in STAGES.values() for key in tree_keys(stage)}
    assert {key for setting in foreign.COUNTERPARTS for key in setting.ours} <= keys


@pytest.mark.parametrize("value", ["wandb", "[wandb]"])
def test_a_single_service_needs_no_brackets(value: str) -> None:
    assert load_config(RECIPE, [f"report_to={value}"], Recipe).config.report_to == ["wandb"]
