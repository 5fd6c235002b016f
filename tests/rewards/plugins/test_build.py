"""From a spec to a reward: every form judges in a real process, and every mistake is told with its line."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.rewards import RewardSpec
from rewards.plugins.build import build_reward
from rewards.plugins.names import FACTORIES, import_reward, locate
from rewards.pool.guard import Guard
from rewards.types import Task

FORMS = """
from rewards.types import Status, Verdict

def plain(task, completion, bonus=0.0):
    return float(completion == task.truth) + bonus

async def waiting(task, completion):
    return float(completion == task.truth)

def abstains(task, completion):
    return Verdict(None, Status.ABSTAIN, "no opinion") if not completion else Verdict(1.0, outcome="fine")

class Plain:
    def __init__(self, word="yes"):
        self.word = word
    def setup(self):
        self.ready = 1.0
    def score(self, task, completion):
        return self.ready * (self.word in completion)

class Batch:
    pool = "model"
    def score_batch(self, tasks, completions):
        return [float(task.truth == text) for task, text in zip(tasks, completions)]

def asks(task, completion):
    return 0.5
asks.pool = "sandbox"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_form_judges(here: Path) -> None:
    (here / "forms.py").write_text(FORMS)
    specs = [
        RewardSpec(name="forms.py:plain", args={"bonus": 0.25}),
        RewardSpec(name="forms.py:waiting"),
        RewardSpec(name="forms.py:abstains"),
        RewardSpec(name="./forms.py:Plain", args={"word": "63"}),
        RewardSpec(name=str(here / "forms.py:Batch")),
        RewardSpec(name="forms.py:asks"),
    ]
    task = Task("7 * 9?", "63")
    with Guard(specs, timeout_seconds=10) as guard:
        guard.start()
        scores = {
            spec.label: [verdict.score for verdict in guard.judge(spec.label, task, ["63", "", "62"])] for spec in specs
        }
        assert scores == {
            "plain": [1.25, 0.25, 0.25],
            "waiting": [1.0, 0.0, 0.0],
            "abstains": [1.0, None, 1.0],
            "Plain": [1.0, 0.0, 0.0],
            "Batch": [1.0, 0.0, 0.0],
            "asks": [0.5, 0.5, 0.5],
        }
        assert {label: post.pool for label, post in guard.placements.items()} == {
            "plain": "rule",
            "waiting": "rule",
            "abstains": "rule",
            "Plain": "rule",
            "Batch": "model",
            "asks": "sandbox",
        }


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        (
            "def mine(completion):\n    return 1.0",
            {},
            r"mine\(completion\) \(.*mine\.py:1\) .* mine\(task, c",
        ),
        ("x = 1\n\ndef mine(task, completion, key):\n    ...", {}, r"mine.py:3\).*missing a required argument: 'key'"),
        ("def mine(task, completion, limit=1):\n    ...", {"limt": 2}, r"args.*'limt'.*'limit'\?; see mine.*mine.py:1"),
        ("def mine(task, completion):\n    ...", {"task": 2}, r"args: unknown key 'task'"),
        ("mine = 3", {}, "neither a function nor a class"),
        ("class mine:\n    def scores(self, task, completion): ...", {}, r"mine.py:1\) has neither score\(task, "),
        (
            "class mine:\n    def score(self, completion): ...",
            {},
            r"mine\.py:2\) .* score\(task, completion\)",
        ),
        ("class mine:\n    def score_batch(self): ...", {}, r"mine\.py:2\) .* score_batch\(tasks, com"),
        ("class mine:\n    score = len\n    def check(self): ...", {}, r"as score\(task, completion\)"),
        ("class mine:\n    def score(self, t, c): ...\n    def check(self): ...", {}, r"mine.py:3\).*check\(task\)"),
        ("class mine:\n    def __init__(self, a): ...\n    def score(self, t, c): ...", {}, "missing 1 req.*'a'"),
        (
            "class mine:\n    def __init__(self):\n        self.a = open('words')\n    def score(self, t, c): ...",
            {},
            r"mine.py:3: FileNotFoundError",
        ),
        ("def mine(prompts, completions, **kwargs):\n    ...", {}, "put 'trl:'"),
        ("def mine(data_source, solution_str, ground_truth): ...", {}, "put 'verl:'"),
        ("def mine(queries, prompts, labels): ...", {}, "put 'openrlhf:'"),
    ],
)
def test_a_reward_that_does_not_fit_is_told(here: Path, source: str, args: dict[str, object], message: str) -> None:
    (here / "mine.py").write_text(source)
    with pytest.raises(ValueError, match=rf"^reward 'mine.py:mine': .*{message}"):
        build_reward(RewardSpec(name="mine.py:mine", args=args))


def test_our_own_rewards_are_there_and_say_what_they_do() -> None:
    for name in FACTORIES:
        factory = import_reward(locate(name))
        assert callable(factory) and factory.__doc__, name


def test_arguments_arrive() -> None:
    assert build_reward(RewardSpec(name="reasoning_gym", args={"extract": "whole"})) != build_reward(
        RewardSpec(name="reasoning_gym")
    )


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("maths", {}, r"^unknown reward 'maths': did you mean 'math'\?"),
        ("reasoning_gym", {"extrakt": "whole"}, r"reasoning_gym.*'extrakt'.*did you mean 'extract'"),
        ("reasoning_gym", {"extract": "half"}, r"reasoning_gym.*extract.*'half'"),
        ("reasoning_gym", {"extract": 1}, r"reasoning_gym.*extract.*1"),
        ("math", {"precision": 6}, r"math.*'precision'"),
    ],
)
def test_wrong_specs_name_what_is_wrong(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward(RewardSpec(name=name, args=args))


def test_the_room_is_light() -> None:
    """What a judging process imports: no torch, no ray, and no checker before one is asked for."""
    heavy = ("torch", "ray", "vllm", "transformers", "sympy", "reasoning_gym")
    program = f"import sys, rewards.pool.guard; sys.exit(str([name for name in {heavy} if name in sys.modules]))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert completed.stderr.strip() == "[]"
    program = (
        "import sys, rewards.math.reward, rewards.rules.gym; "
        f"sys.exit(str([name for name in {heavy[:4]} if name in sys.modules]))"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert completed.stderr.strip() == "[]"
