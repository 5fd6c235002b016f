from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from configs.load import RECIPES, leaves, load_config, read_yaml
from configs.stages import Recipe

FIXTURE = Path(__file__).parent / "recipe.yaml"
RECIPE_FILES = [FIXTURE, *sorted(RECIPES.glob("*.yaml"))]


def idle_keys(data: dict[str, Any]) -> list[str]:
    """The keys of `data` that change nothing: without each of them the recipe is the same."""
    whole = Recipe.model_validate(data)
    idle: list[str] = []
    for key, _ in leaves(data):
        without = deepcopy(data)
        *above, last = key.split(".")
        node: Any = without
        for part in above:
            node = node[int(part) if isinstance(node, list) else part]
        del node[last]
        try:
            if Recipe.model_validate(without) == whole:
                idle.append(key)
        except ValidationError:
            continue  # a key that must be there
    return idle


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda file: file.stem)
def test_a_recipe_is_valid_and_holds_only_what_differs_from_the_defaults(file: Path) -> None:
    load_config(str(file), [], Recipe)
    recipe = read_yaml(file)
    if "seed" in recipe:  # else keys that follow it would look idle where it is their default
        recipe["seed"] = 7
    data: Any = OmegaConf.to_container(recipe, resolve=True)
    assert idle_keys(data) == []


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_recipe_is_found_by_its_name(file: Path) -> None:
    assert load_config(file.stem, [], Recipe).config.name == file.stem


def test_a_key_at_its_default_is_noticed() -> None:
    data: Any = OmegaConf.to_container(read_yaml(FIXTURE), resolve=True)
    data["runs_dir"] = "runs"
    data["stages"]["reason"]["rewards"][0]["weight"] = 1.0
    assert sorted(idle_keys(data)) == ["runs_dir", "stages.reason.rewards.0.weight"]
