"""Text of others controls no terminal, and files of others run no code: sources are searched for every way to do so."""

import ast
import re
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from configs.gate import HoldRule
from configs.visible import visible
from jobs.cli import main
from jobs.command import OUT, escape_output, one_line, plain_table, print_error
from jobs.conductor import Conductor
from jobs.start import write
from pipeline.disk.run_record import LOG, RunRecord, StageRecord
from pipeline.evaluation.suites import SuiteResult, results_table
from pipeline.gates.decision import rules_table
from pipeline.gates.rules import Ruling
from tests.test_architecture import FILES, place

ESCAPED = r"\x1b]0;owned\x07\x1b[2J \x9b2J \x08\r\u202e"
HOSTILE = ESCAPED.encode("ascii").decode("unicode_escape")
OURS = [file for file in FILES if not place(file).startswith("tests/")]


def test_characters_that_are_not_seen_are_written_out() -> None:
    assert visible(HOSTILE) == ESCAPED
    assert (
        visible("a\n\tb \u3000\u4e2d \u00e9 \U0001f468\u200d\U0001f469")
        == "a\n\tb \u3000\u4e2d \u00e9 \U0001f468\u200d\U0001f469"
    )
    assert visible("\ud800").encode() == rb"\ud800"


def by_rich(*columns: Any) -> str:
    console = Console(file=StringIO(), width=200, color_system=None)
    console.print(*columns)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def table(text: str) -> Table:
    filled = plain_table(text)
    filled.add_row(text)
    return filled


@pytest.fixture
def safe_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # back after the test
    escape_output()


@pytest.mark.usefixtures("safe_output")
@pytest.mark.parametrize("renderable", [str, table, Tree], ids=["text", "table", "tree"])
def test_all_that_rich_prints_is_visible(renderable: Any) -> None:
    printed = by_rich(renderable(HOSTILE))
    assert ESCAPED in printed and not set(printed) & set("\x1b\x07\x9b\u202e")


def test_a_narrow_terminal_breaks_long_words_of_a_table_and_cuts_none() -> None:
    word = "programs/pass@1_of_all_of_them"
    rule = HoldRule(type="hold", figure=word, tolerance=0.05)
    ruling = Ruling(rule, 0.1, 0.1, 0.0, -0.1, 0.1, "holds", 600)
    for shown in (table(word), results_table({"programs": SuiteResult({word: 0.5})}), rules_table([ruling])):
        console = Console(file=StringIO(), width=80 if shown.columns[1:] else 12, color_system=None)
        console.print(shown)
        printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert "\u2026" not in printed and word.startswith(next(re.finditer(r"programs/\S+", printed))[0])
        assert "em" in printed, "the last letters of the word"


@pytest.mark.usefixtures("safe_output")
def test_rich_still_moves_the_cursor_and_colours(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=80)
    with console.status("working"):
        console.print("red", style="red")
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\x1b[31mred" in printed and "\x1b[?25h" in printed


@pytest.mark.usefixtures("safe_output")
def test_output_of_other_processes_errors_and_tracebacks_are_visible(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(HOSTILE)
    print_error(HOSTILE)
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    (tmp_path / "grpo").mkdir()
    conductor: Any = SimpleNamespace(_order=SimpleNamespace(folder=tmp_path), _log_threads={}, _prefixed={"grpo"})
    Conductor._log_writer(conductor, "grpo")(HOSTILE)  # pyright: ignore[reportPrivateUsage]
    assert (tmp_path / "grpo" / "console.log").read_text() == ESCAPED
    out, err = capsys.readouterr()
    assert out == f"{ESCAPED}[grpo] {ESCAPED}" and err.count(ESCAPED) == 2 and "\x1b" not in err
    assert one_line(HOSTILE, 200) == visible(" ".join(HOSTILE.split()))


@pytest.mark.parametrize("verb", ["logs", "status", "list"])
@pytest.mark.usefixtures("safe_output")
def test_verbs_show_hostile_records_as_text(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version, or somebody else, may have written them."""
    monkeypatch.setattr(OUT, "width", 300)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOG).write_text(HOSTILE)
    stage = StageRecord("sft", [], state="failed", reason=HOSTILE)
    RunRecord("run", str(folder), {"sft": stage}, state="failed", started=1, reason=HOSTILE).write()
    arguments = {"logs": ["logs", "run"], "status": ["status", "run"], "list": ["list"]}[verb]
    main([*arguments, "--runs-dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\x9b\u202e")
    assert verb == "list" or r"\x1b]0;owned" in out


RAW_WRITES = {"print", "sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer.write", "sys.stderr.buffer.write"}
PLAIN = {"jobs/bench/models.py: sys.stdout.write", "jobs/bench/trl_step.py: print", "jobs/cli.py: print"}
"""Writes of this project's own words."""
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch", "numpy", "np", "yaml"}
LOADS = {"load", "loads", "Unpickler", "open", "unsafe_load", "full_load", "load_all"}
RESTRICTED = {"pipeline/evaluation/livecodebench.py: pickle.Unpickler", "pipeline/train/reference.py: np.load"}
"""An unpickler that refuses whatever names a function, and an array, which numpy reads without pickles by default."""
FLAGS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def raw_writes(source: str) -> Iterator[str]:
    """Calls that write text to the terminal of which no part went through `visible`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in RAW_WRITES:
            called = {ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
            if "visible" not in called:
                yield name


def code_loaders(source: str) -> Iterator[str]:
    """Names of functions that run code which a file names, and arguments that allow others to."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in UNPICKLERS and name in LOADS:
                yield f"{module}.{name}"
            case ast.ImportFrom(module=module, names=names) if module in UNPICKLERS:
                yield from (f"{module}.{alias.name}" for alias in names if alias.name in LOADS)
            case ast.keyword(arg=str(name), value=value) if name in FLAGS:
                if not (isinstance(value, ast.Constant) and value.value is not FLAGS[name]):
                    yield name
            case _:
                continue


def test_nothing_writes_to_a_terminal_past_the_escapes() -> None:
    assert {f"{place(file)}: {name}" for file in OURS for name in raw_writes(file.read_text())} == PLAIN


def test_no_code_is_loaded_from_files_of_others() -> None:
    assert {f"{place(file)}: {name}" for file in OURS for name in code_loaders(file.read_text())} == RESTRICTED


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("print(text)", ["print"]),
        ("print(visible(text))", []),
        ("sys.stderr.write(text)", ["sys.stderr.write"]),
        ("torch.load(file)", ["torch.load"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("class Mine(pickle.Unpickler): pass", ["pickle.Unpickler"]),
        ("np.load(file, allow_pickle=True)", ["np.load", "allow_pickle"]),
        ("AutoModel.from_pretrained(name, trust_remote_code=anything)", ["trust_remote_code"]),
        ("AutoModel.from_pretrained(name, trust_remote_code=False)", []),
        ("yaml.safe_load(text), json.loads(text), pickle.dumps(row)", []),
    ],
)
def test_the_search_finds_each_way(source: str, found: list[str]) -> None:
    assert [*raw_writes(source), *code_loaders(source)] == found
