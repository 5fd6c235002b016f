"""Names and what they lead to: files, modules, entry points; and the words for every wrong turn."""

import sys
from pathlib import Path

import pytest

import rewards.math.reward
from configs.rewards import RewardSpec
from pipeline.judging.checkpoint import CheckpointJudge
from rewards.plugins.build import build_reward
from rewards.plugins.names import FACTORIES, MODEL_KINDS, absolute, import_reward, list_rewards, locate, source_file
from rewards.pool.guard import Guard
from rewards.types import Task

ONE = "def score(task, completion):\n    return 1.0\n"
TASK = Task("", "")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, **files: str) -> None:
    """A package that can be imported until the test ends."""
    (folder / name).mkdir()
    for file, text in {"__init__": "", **files}.items():
        (folder / name / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, package_name: str, **entries: str) -> None:
    """A distribution that brings entry points."""
    info = folder / f"{package_name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package_name}\nVersion: 1.0\n")
    lines = [f"{name} = {where}" for name, where in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[alignyard.rewards]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("stem", ["json", "math", "rewards", "with-dash", "two words"])
def test_a_file_neither_hides_a_module_nor_is_hidden(here: Path, stem: str) -> None:
    before = {name: module for name, module in sys.modules.items() if name in ("json", "math", "rewards")}
    (here / f"{stem}.py").write_text("import json\nfrom rewards.types import Verdict\n\n" + ONE)
    assert build_reward(RewardSpec(name=f"{stem}.py:score")).score(TASK, "") == 1.0
    assert {name: sys.modules[name] for name in before} == before


def test_files_of_one_name_are_two(here: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (here / folder).mkdir()
        (here / folder / "mine.py").write_text(f"def score(task, completion):\n    return {value}\n")
    assert [build_reward(RewardSpec(name=f"{folder}/mine.py:score")).score(TASK, "") for folder in "ab"] == [1.0, 2.0]


def test_a_file_runs_once_and_leaves_nothing_beside_it(here: Path) -> None:
    (here / "mine.py").write_text("made = []\nclass A:\n    made.append(1)\nclass B:\n    pass\n")
    first, second = import_reward(locate("mine.py:A")), import_reward(locate("mine.py:B"))
    assert sys.modules[first.__module__] is sys.modules[second.__module__]
    assert sys.modules[first.__module__].made == [1]
    assert [file.name for file in here.iterdir()] == ["mine.py"]


def test_an_absolute_spec_builds_from_anywhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mine.py").write_text(
        ONE + "\ndef by_verl(data_source, solution_str, ground_truth, extra_info):\n    return 2\n"
    )
    relative = [RewardSpec(name="mine.py:score", weight=0.5), RewardSpec(name="verl:./mine.py:by_verl")]
    specs = [absolute(spec) for spec in relative]
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert [(spec.label, spec.weight) for spec in specs] == [("score", 0.5), ("by_verl", 1.0)]
    with Guard(specs, timeout_seconds=10) as guard:
        assert [guard.judge(spec.label, TASK, ["x"])[0].score for spec in specs] == [1.0, 2.0]
    for name in ("math", "trl:package.module:name"):
        assert absolute(RewardSpec(name=name)).name == name


def test_import_paths(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(here, monkeypatch, "someones", rules=ONE)
    assert build_reward(RewardSpec(name="someones.rules:score")).score(TASK, "") == 1.0


def test_entry_points(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(here, monkeypatch, "theirs", rules='def score(task, completion):\n    """Always one."""\n    return 1.0\n')
    installed(here / "x", monkeypatch, "theirs", polite="theirs.rules:score", math="theirs.rules:score")
    assert build_reward(RewardSpec(name="polite")).score(TASK, "") == 1.0
    assert locate("math").where == "rewards.math.reward"  # not theirs
    listed = {listing.name: listing for listing in list_rewards()}
    assert (listed["polite"].pool, listed["polite"].summary) == ("rule", "Always one.")
    assert set(listed) == {*FACTORIES, "polite"} and listed["math"].summary.startswith("Score 1.0")
    with pytest.raises(ValueError, match="did you mean 'polite'"):
        locate("polit")
    installed(here / "y", monkeypatch, "others", polite="theirs.rules:score")
    with pytest.raises(ValueError, match="'polite': others, theirs"):
        locate("polite")


def test_rewards_that_load_a_checkpoint_are_listed_with_the_kind_of_model() -> None:
    classes = {name: import_reward(locate(name)) for name in FACTORIES if name != "refusal"}  # a function
    assert {name for name, reward in classes.items() if issubclass(reward, CheckpointJudge)} == set(MODEL_KINDS)


def test_a_broken_entry_point_does_not_break_the_list(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(here / "x", monkeypatch, "broken", lost="no_such_module:score")
    [lost] = [listing for listing in list_rewards() if listing.name == "lost"]
    assert "no module 'no_such_module'" in lost.summary


def test_the_source_is_found_without_running_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = "raise RuntimeError('was run')\n"
    (here / "mine.py").write_text(bomb)
    package(here, monkeypatch, "loaded", __init__=bomb, rules=bomb)
    assert source_file(RewardSpec(name="trl:mine.py:score")) == here / "mine.py"
    assert source_file(RewardSpec(name="loaded.rules:score")) == here / "loaded" / "rules.py"
    assert source_file(RewardSpec(name="math")) == Path(rewards.math.reward.__file__)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os\n\ndef score(task completion):\n    pass\n", r"mine.py:3: SyntaxError: "),
        ("x = 1\nimport no_such_thing\n", r"mine\.py:2: ModuleNotFoundError: .*'no_such_thing'"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"mine.py:2: ZeroDivisionError"),
        ("import sys\nsys.exit('usage')\n", r"mine.py:2: SystemExit: usage"),
        ("import json\njson.loads('{')\n", r"mine.py:2: JSONDecodeError"),
        ("def scored(task, completion): ...", r"mine.py has no 'score': did you mean 'scored'\?"),
        ("", r"mine.py has no 'score': known: \(none\)"),
        ("\x00", r"mine.py: (SyntaxError|ValueError): source code"),
    ],
)
def test_a_file_that_does_not_load_is_told_with_its_line(here: Path, source: str, message: str) -> None:
    (here / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=rf"^reward 'mine.py:score': .*{message}"):
        build_reward(RewardSpec(name="mine.py:score"))


def test_a_module_that_does_not_load_is_told_with_its_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(here, monkeypatch, "breaks", rules="import os\nos.no_such_thing\n")
    with pytest.raises(ValueError, match=r"breaks/rules.py:2: AttributeError"):
        build_reward(RewardSpec(name="breaks.rules:score"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mien.py:score", r"'mien\.py' .*: did you mean 'mine\.py'"),
        ("./mien.py:score", r"'\./mien\.py' .*: did you mean 'mine\.py'"),
        ("no/such/folder.py:score", r"'no/such/folder\.py'"),
        ("mine", r"did you mean mine\.py:mine"),
        ("mine.py", r"as in mine\.py:NAME"),
        ("no_such_package.rules:score", r"'no_such_package\.rules' .*by its path"),
        ("json.no_such_module:score", "no module 'json.no_such_module'"),
        ("trl:", "unknown reward ''"),
        ("mine.py:", "half a name"),
        (":score", "half a name"),
        ("..rules:score", "no module"),
    ],
)
def test_names_that_lead_nowhere(here: Path, name: str, message: str) -> None:
    (here / "mine.py").write_text(ONE)
    with pytest.raises(ValueError, match=message):
        build_reward(RewardSpec(name=name))
    with pytest.raises(ValueError, match=message):
        source_file(RewardSpec(name=name))
