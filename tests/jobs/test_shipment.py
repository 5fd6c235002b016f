"""The files that travel with a run to a cluster, and those that stay behind."""

from pathlib import Path
from typing import Any

import pytest

from configs.stages import Recipe
from jobs import shipment
from jobs.shipment import Shipment, pack_files

SUMS = {"source": {"type": "sums", "size": 10}, "max_prompt_length": 16}


def recipe(source: Any, rewards: list[dict[str, Any]], model: str = "/models/base") -> Recipe:
    stage = {
        "type": "grpo",
        "model": {"path": model, "chat_template": "talk.jinja"},
        "prompts": SUMS | {"source": source},
        "rewards": rewards,
        "steps": 1,
        "prompts_per_step": 2,
        "group_size": 2,
        "sampling": {"max_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
        "rollout": {"max_model_len": 32},
    }
    return Recipe.model_validate({"name": "carried", "stages": {"grpo": stage}})


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a plug-in, what it imports, data and a template."""
    folder = tmp_path / "work"
    for name, text in {
        "rules/good.py": "from words import GOOD\ndef score(completion, truth): return float(completion in GOOD)",
        "rules/words.py": "GOOD = {'yes'}",
        "rules/unused.py": "",
        "data/a.jsonl": "{}",
        "data/b.jsonl": "{}" * 100,
        "talk.jinja": "{{ messages }}",
        "../beside/c.jsonl": "{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def carried(paths: list[str], package: Path, *, model: str = "/models/base") -> Shipment:
    return pack_files(recipe({"type": "file", "paths": paths}, [{"name": "rules/good.py:score"}], model), package)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_a_recipe_names_travels_and_is_found_under_the_same_names(work: Path, tmp_path: Path) -> None:
    package, run = tmp_path / "package", tmp_path / "run"
    shipped = carried(["data/*.jsonl"], package)
    start = shipped.unpack(package, run)
    assert start == run / "files"
    assert files(start) == {"data/a.jsonl", "data/b.jsonl", "rules/good.py", "rules/words.py", "talk.jinja"}
    assert files(package) == {f"files/{name}" for name in files(start)}  # nothing of ours on Ray's PYTHONPATH


def test_paths_above_the_working_directory_keep_their_place(work: Path, tmp_path: Path) -> None:
    package, run = tmp_path / "package", tmp_path / "run"
    start = carried(["../beside/c.jsonl"], package).unpack(package, run)
    assert (start / "../beside/c.jsonl").is_file() and (start / "rules/good.py").is_file()


def test_a_small_checkpoint_travels_and_another_folder_does_not(work: Path, tmp_path: Path) -> None:
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text("{}")
    (work / "grpo").mkdir()  # named like a value of the recipe
    (work / "grpo" / "notes").write_text("")
    carried(["data/a.jsonl"], tmp_path / "package", model="model")
    assert {"files/model/config.json", "files/data/a.jsonl"} <= files(tmp_path / "package")
    assert "files/grpo/notes" not in files(tmp_path / "package")


def test_absolute_paths_stay_the_clusters_own(work: Path, tmp_path: Path) -> None:
    carried([str(work / "data" / "a.jsonl")], tmp_path / "package")
    assert "files/data/a.jsonl" not in files(tmp_path / "package")


def test_what_is_too_large_is_linked_where_the_head_has_it(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipment, "TRAVEL_MIB", 150 / 2**20)
    package, run = tmp_path / "package", tmp_path / "run"
    shipped = carried(["data/*.jsonl"], package)
    assert list(shipped.too_large) == ["data/b.jsonl"]
    start = shipped.unpack(package, run)
    assert (start / "data" / "b.jsonl").resolve() == work / "data" / "b.jsonl"
    (work / "data" / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"'data/b.jsonl' is too large to travel.*give its absolute path"):
        shipped.unpack(package, run)


def test_a_second_start_replaces_the_files_of_the_first(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    carried(["data/a.jsonl"], tmp_path / "one").unpack(tmp_path / "one", run)
    (work / "rules" / "words.py").write_text("GOOD = {'no'}")
    start = carried(["data/b.jsonl"], tmp_path / "two").unpack(tmp_path / "two", run)
    assert "no" in (start / "rules" / "words.py").read_text() and not (start / "data" / "a.jsonl").exists()
