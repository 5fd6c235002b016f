"""The source files of a judge include every file that it imports."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.rewards import RewardSpec
from pipeline.run.sources import HOME, JUDGING_MODULES, ROOMS, module_sources, plugin_sources, reward_files, source_hash
from rewards.plugins.names import FACTORIES, locate


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rooms, to be edited."""
    home = tmp_path_factory.mktemp("home")
    for room in ROOMS:
        shutil.copytree(HOME / room, home / room, ignore=shutil.ignore_patterns("__pycache__"))
    return home


def hash_in(home: Path, name: str) -> str:
    return source_hash(module_sources(locate(name).where, *JUDGING_MODULES, home=home))


@pytest.mark.parametrize("name", FACTORIES)
def test_an_edit_of_any_imported_file_changes_the_hash_and_of_no_other(copy: Path, name: str) -> None:
    before = hash_in(copy, name)
    assert before == source_hash(reward_files(RewardSpec(name=name)))
    made_of = module_sources(locate(name).where, *JUDGING_MODULES, home=copy)
    for place, file in made_of.items():
        content = file.read_bytes()
        file.write_bytes(content + b"\n# another comment\n")
        assert hash_in(copy, name) != before, place
        file.write_bytes(content)
    for file in (copy / "jobs" / "cli.py", copy / "pipeline" / "stage.py"):
        assert str(file.relative_to(copy)) not in made_of
    assert hash_in(copy, name) == before


IMPORTED = """
import sys
from importlib import import_module
for module in sys.argv[1:]:
    import_module(module)
print(*(name for name in sys.modules if name.partition(".")[0] in {"configs", "rewards", "rollout", "pipeline"}))
"""


@pytest.mark.parametrize("name", ["math", "code", "judge", "reward_model", "self_judge"])
def test_whatever_python_imports_is_among_the_files(name: str) -> None:
    module = locate(name).where
    command = [sys.executable, "-c", IMPORTED, module, *JUDGING_MODULES]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=120, check=True)
    found = module_sources(module, *JUDGING_MODULES)
    for imported in done.stdout.split():
        stem = imported.replace(".", "/")
        assert {f"{stem}.py", f"{stem}/__init__.py"} & found.keys(), imported


def test_imports_within_functions_count() -> None:
    """The chat format and vLLM's pooling engine, which a reward model loads when it is set up."""
    files = {"pipeline/data/chat.py", "rollout/pooling.py", "rewards/pool/guard.py", "pipeline/grpo/mix.py"}
    assert files <= reward_files(RewardSpec(name="reward_model")).keys()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_plugins_own_package_is_followed_and_no_other(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "mine/__init__.py": "from . import late\n",
            "mine/late.py": "",
            "mine/score.py": "import other, json\nfrom .parts import words\nfrom rewards.rules.form import Length\n",
            "mine/parts/__init__.py": "from ..above import *\n",
            "mine/parts/words.py": "def f():\n    import mine.inner.deep as deep\n",
            "mine/above.py": "",
            "mine/inner/deep.py": "",
            "mine/unused.py": "",
            "other.py": "",
        },
    )
    found = plugin_sources(tmp_path / "mine" / "score.py", "mine.score")
    theirs = {name for name in found if name.partition("/")[0] not in ROOMS}
    assert theirs == {
        f"mine/{name}.py"
        for name in ("__init__", "late", "score", "parts/__init__", "parts/words", "above", "inner/deep")
    }
    assert "rewards/rules/form.py" in found


def test_modules_beside_a_plugins_file_count(tmp_path: Path) -> None:
    write(tmp_path, {"polite.py": "from words import good\n", "words.py": "good = ['please']\n", "else.py": ""})
    spec = RewardSpec(name=f"{tmp_path / 'polite.py'}:polite")
    before = source_hash(reward_files(spec))
    write(tmp_path, {"else.py": "changed = 1\n"})
    assert source_hash(reward_files(spec)) == before
    write(tmp_path, {"words.py": "good = ['thanks']\n"})
    assert source_hash(reward_files(spec)) != before


def test_what_is_not_python_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, {"bad.py": "x = 1\ndef f(:\n"})
    with pytest.raises(ValueError, match=r"bad\.py:2: "):
        plugin_sources(tmp_path / "bad.py")
