"""Follows docs/add_a_reward.md: writes every file, runs every command in order, then builds the recipe's rewards."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.grpo import GRPOConfig
from configs.load import load_config
from configs.stages import Recipe
from rewards.offline import read_completions
from rewards.plugins.names import LIBRARIES
from rewards.pool.guard import inspect, unjudgeable

PAGE = (Path(__file__).parents[2] / "docs" / "add_a_reward.md").read_text()
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder in which the page was followed, and what its commands printed."""
    folder = tmp_path_factory.mktemp("page")
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "120"}
    printed: dict[str, str] = {}
    for language, file, text in BLOCK.findall(PAGE):
        if file:
            (folder / file).write_text(text)
            continue
        assert language == "sh"
        for command in text.splitlines():
            result = subprocess.run(
                shlex.split(command),
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            printed[command] = result.stdout
    return folder, printed


def test_the_page_was_followed(page: tuple[Path, dict[str, str]]) -> None:
    folder, printed = page
    verbs = {tuple(shlex.split(command)[:3]) for command in printed if command.startswith("alignyard reward")}
    assert verbs == {("alignyard", "reward", verb) for verb in ("new", "check", "score")}
    checked = printed["alignyard reward check units.py:units --data answers.jsonl"]
    assert "gold answers" in checked and "4 of 4" in checked and "BROKEN" not in checked
    rows = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert [(row["score"], row["outcome"]) for row in rows] == [
        (1.0, ""),
        (0.5, "wrong unit"),
        (0.0, "wrong number"),
        (0.0, "no quantity"),
    ]


def test_the_recipe_runs_with_these_rewards(page: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page[0])
    stage = load_config("lengths.yaml", [], Recipe).config.stages["grpo"]
    assert isinstance(stage, GRPOConfig)
    tasks = [row.task for row in read_completions(Path("answers.jsonl"))]
    posts = inspect(stage.rewards, stage.reward_pool)
    assert {label: post.pool for label, post in posts.items()} == dict.fromkeys(
        ("units", "length", "repetition"), "rule"
    )
    assert unjudgeable(stage.rewards, stage.reward_pool, tasks) == [None] * len(tasks)


def test_every_library_is_on_the_page() -> None:
    assert all(f"`{library}:`" in PAGE for library in LIBRARIES)
