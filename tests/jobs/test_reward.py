"""`alignyard reward`: what it writes, prints and ends with."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.rewards import RewardPoolConfig
from jobs.cli import main
from jobs.verbs.reward import check

ROWS = [
    {"prompt": "France?", "completion": "Paris", "truth": "Paris", "expected": 1},
    {"prompt": "Spain?", "completion": "Lisbon", "truth": "Madrid", "expected": 0},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alignyard(*arguments: str) -> int:
    return main(["reward", *arguments])


def write(file: str, *rows: object) -> None:
    Path(file).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def read(file: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_a_new_reward_works_with_its_test_and_keeps_the_contract(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert alignyard("new", "capital") == 0
    assert sorted(file.name for file in here.iterdir()) == ["capital.py", "test_capital.py"]
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_capital.py"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout
    write("rows.jsonl", *ROWS)
    capsys.readouterr()
    assert alignyard("check", "capital.py:capital", "--data", "rows.jsonl") == 0
    printed = capsys.readouterr().out
    assert "gold answers" in printed and "2 of 2" in printed and "BROKEN" not in printed


def test_new_files_are_clean(here: Path) -> None:
    assert alignyard("new", "capital") == 0
    for command in (["check", "--select", "E,F,W,I,B,UP,SIM,N,RUF,C4,D1", "--ignore", "D103"], ["format", "--check"]):
        ran = subprocess.run(
            [str(Path(sys.executable).parent / "ruff"), *command, "--isolated", "--line-length", "120", "."],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", "'exact.py' exists and is not overwritten"),
        ("lost", "'test_lost.py' exists and is not overwritten"),
        ("json", "NAME='json' is a module already"),
        ("rewards", "NAME='rewards' is a module already"),
        ("two words", "must do as the name of a Python function"),
        ("class", "must do as the name"),
        ("../up", "must do as the name"),
    ],
)
def test_new_refuses_names_in_use(here: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "exact.py").write_text("precious")
    (here / "test_lost.py").write_text("precious")
    assert alignyard("new", name) == 2
    assert message in capsys.readouterr().err
    assert sorted(file.read_text() for file in here.iterdir()) == ["precious", "precious"]


def test_check_ends_with_one_when_a_rule_is_broken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alignyard("new", "capital") == 0
    write("rows.jsonl", {**ROWS[0], "completion": "\x1b[31mparis\x00"}, *ROWS)
    assert alignyard("check", "capital.py:capital", "ignore_case=false", "--data", "rows.jsonl") == 1
    printed = capsys.readouterr().out
    assert "BROKEN" in printed and "rows.jsonl:1: 0 where 1 is expected" in " ".join(printed.split())
    assert "\x1b[31mparis" not in printed and "\x00" not in printed


def test_score_writes_the_same_rows_in_the_same_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(
        "from rewards.types import Status, Verdict\n\n\n"
        "def mine(task, completion, right=1):\n"
        "    if completion == 'none':\n"
        "        return Verdict(None, Status.ABSTAIN, 'no opinion')\n"
        "    if completion == 'broken':\n"
        "        raise RuntimeError('out of order')\n"
        "    return Verdict(right * float(completion == task.truth), outcome='read', detail='\\ud800')\n"
    )
    unjudged = ({"prompt": "p", "completion": text, "n": [{"a": None}, "\u00e9\ud800"]} for text in ("none", "broken"))
    write("rows.jsonl", ROWS[0], "no json", *unjudged, ROWS[1], {"prompt": "p"})
    assert alignyard("score", "mine.py:mine", "right=2", "--data", "rows.jsonl", "--out", "new/judged.jsonl") == 0
    judged = read("new/judged.jsonl")
    assert [(row["score"], row["status"]) for row in judged] == [
        (2.0, "ok"),
        (None, "bad_row"),
        (None, "abstain"),
        (None, "infra_error"),
        (0.0, "ok"),
        (None, "bad_row"),
    ]
    added = {"score", "status", "outcome", "detail", "seconds"}
    written = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines() if line != "no json"]
    own_columns = [{key: value for key, value in row.items() if key not in added} for row in judged]
    assert [row for row in own_columns if "line" not in row] == written and own_columns[1] == {"line": "no json"}
    assert all(set(row) >= added for row in judged)
    assert [file.name for file in (here / "new").iterdir()] == ["judged.jsonl"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean score 1.0000 score 1 or more 1 of 2 (50.0%)" in printed
    assert "bad_row 2 of 6" in printed and "abstain 1 of 6" in printed and "infra_error 1 of 6" in printed
    assert "read 2 of 6" in printed and "rows.jsonl:2: bad_row: not JSON" in printed
    assert "rows.jsonl:4: infra_error: RuntimeError: out of order (mine.py, line 8)" in printed


def test_a_failed_score_keeps_the_old_file(here: Path) -> None:
    write("rows.jsonl", *ROWS)
    write("judged.jsonl", "precious")
    (here / "mine.py").write_text("def mine(task): ...\n")
    assert alignyard("score", "mine.py:mine", "--data", "rows.jsonl", "--out", "judged.jsonl") == 2
    assert Path("judged.jsonl").read_text() == "precious\n"
    assert sorted(file.name for file in here.iterdir()) == ["judged.jsonl", "mine.py", "rows.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["check", "math", "--data", "nowhere.jsonl"], "no file 'nowhere.jsonl'"),
        (["check", "maths", "--data", "rows.jsonl"], "unknown reward 'maths': did you mean 'math'?"),
        (["check", "math", "precision=3", "--data", "rows.jsonl"], "unknown key 'precision'"),
        (
            ["check", "math", "precision", "--data", "rows.jsonl"],
            "'precision': an argument of the reward is written key=",
        ),
        (["check", "math", "--data", "rows.jsonl", "--truth", "gold"], "no column 'gold'"),
        (["check", "math", "--data", "rows.jsonl", "--timeout", "0"], "--timeout 0: a verdict takes time"),
        (["score", "math", "--data", "rows.jsonl", "--out", "o", "--workers", "0"], "--workers 0: at least one"),
        (["check", "math", "--data", "empty.jsonl"], "no row can be judged"),
    ],
)
def test_wrong_arguments_are_refused(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", *ROWS)
    write("empty.jsonl")
    assert alignyard(*line) == 2
    assert message in capsys.readouterr().err


def test_list_shows_our_rewards_with_their_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert alignyard("list") == 0
    printed = capsys.readouterr().out
    assert "math" in printed and "reasoning_gym" in printed and "rule" in printed and "gold" in printed


def test_the_default_limit_is_a_recipes() -> None:
    assert inspect.signature(check).parameters["timeout"].default == RewardPoolConfig().timeout_seconds


@pytest.mark.parametrize("verb", ["list", "new", "check", "score"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert alignyard(verb, "--help") == 0
    printed = capsys.readouterr().out
    assert f"alignyard reward {verb}" in printed.split("Example")[1] and "Exit codes:" in printed
