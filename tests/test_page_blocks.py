"""Code blocks of all pages: commands parse, settings are valid, Python compiles."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError, create_model
from typer._click.exceptions import ClickException, MissingParameter
from typer.core import TyperGroup
from typer.main import get_command

from configs.base import Settings
from configs.evaluation import Suite
from configs.graph import graph
from configs.load import RECIPES, load_config, read_yaml
from configs.stages import STAGES, Recipe
from jobs.cli import VERBS
from pipeline.run.stage import check_stage
from tests.test_pages import HOME, PAGES

BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
ELISION = re.compile(r"# \.\.\.$|\.\.\.[,}]", re.MULTILINE)
"""Marks of a block that leaves keys out."""
TARGET = re.compile(r"^([a-z0-9-]+):", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block, with its page and the line that it begins at."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found: list[Block] = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            code = re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[2], code))
    return [block for block in found if block.language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command of a shell, without what it is joined to, redirected to or told by the environment."""
    text = re.sub(r"<<'?(\w+)'?\n.*?\n\1\n", "\n", text.replace("\\\n", " "), flags=re.DOTALL)
    text = re.sub(r"(^|\s)#[^\n]*", r"\1", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split = " \t", True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&\n"):
            yield words
            words = []
        elif words or not re.match(r"\w+=", word):
            braces = re.match(r"([\w.]+\.)\{([\w,]+)\}(.*)", word)
            words += [f"{braces[1]}{name}{braces[3]}" for name in braces[2].split(",")] if braces else [word]


def alignyard_commands() -> list[tuple[Block, list[str], bool]]:
    """Each command of a verb, and whether it stands for several (`status|logs RUN`), which may lack arguments."""
    found: list[tuple[Block, list[str], bool]] = []
    for block in blocks("sh", "bash"):
        for line in re.split(r"(?<!\\)\n", block.text):
            choice = re.match(r"(alignyard(?: \w+)?) ([a-z-]+(?:\|[a-z-]+)+)(?:\|\.\.\.)?( .*)?$", line)
            names = choice[2].split("|") if choice else []
            lines = [f"{choice[1]} {name}{choice[3] or ''}" for name in names] if choice else []
            found += [(block, words, True) for text in lines for words in commands(text)]
        text = re.sub(r"^alignyard(?: \w+)? [a-z-]+\|.*$", "", block.text, flags=re.MULTILINE)
        found += [(block, words, False) for words in commands(text)]
    return [
        (block, words, may_lack)
        for block, words, may_lack in found
        if words[:1] == ["alignyard"] and not words[1].startswith("-")  # an option might install completions
    ]


def problem_of(words: list[str], *, may_lack: bool = False) -> str:
    """The reason why the parser of the verb, or a shipped recipe, refuses a command; empty where it takes it."""
    _, verb, *rest = words
    try:
        group = get_command(import_module(f"jobs.verbs.{VERBS[verb][0]}").app)
        command = group.commands.get(verb, group) if isinstance(group, TyperGroup) else group
        if isinstance(command, TyperGroup):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(verb, list(rest))
    except (ClickException, KeyError, IndexError) as error:
        lacks = isinstance(error, MissingParameter) and may_lack
        return "" if lacks else f"{type(error).__name__}: {getattr(error, 'message', error)}"
    if verb == "run" and (RECIPES / f"{rest[0]}.yaml").is_file():
        try:
            load_config(rest[0], [word for word in rest[1:] if "=" in word and not word.startswith("-")], Recipe)
        except ValueError as error:
            return str(error)
    return ""


def test_every_command_of_a_page_is_one_that_its_verb_takes() -> None:
    found = alignyard_commands()
    assert len(found) >= 75 and {words[1] for _, words, _ in found} > {"run", "sft", "chat", "serve", "gate", "reward"}
    problems = {
        f"{block}: {shlex.join(words)}": problem_of(words, may_lack=may_lack) for block, words, may_lack in found
    }
    assert not {command: problem for command, problem in problems.items() if problem}


@pytest.mark.parametrize(
    "command", ["alignyard rnu demo", "alignyard run demo --dry", "alignyard run demo sead=1", "alignyard gate decide"]
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    assert problem_of(command.split())


def test_every_make_target_of_a_page_exists() -> None:
    targets = {*TARGET.findall((HOME / "Makefile").read_text())}
    named = {
        word
        for block in blocks("sh", "bash")
        for words in commands(block.text)
        if words[:1] == ["make"]
        for word in words[1:]
        if "=" not in word
    }
    assert len(named) >= 10 and named <= targets


def without_elisions(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_elisions(below) for key, below in value.items() if key != "..."}
    return [without_elisions(below) for below in value] if isinstance(value, list) else value


def check_keys(data: dict[str, Any], models: list[type[Settings]], *, may_lack: bool) -> None:
    """Validate the keys by the first of `models` that has all of them. may_lack: keys below them may be left out."""
    model = next((model for model in models if set(data) <= set(model.model_fields)), None)
    assert model is not None, f"no stage has all of {sorted(data)}"
    fields: Any = {key: (model.model_fields[key].annotation, model.model_fields[key]) for key in data}
    try:
        create_model("Part", __base__=Settings, **fields).model_validate(data)
    except ValidationError as error:
        if not may_lack or {problem["type"] for problem in error.errors()} != {"missing"}:
            raise


def check_settings(text: str, folder: Path) -> None:
    """Validate the settings of a block: a recipe, a stage, or a part of one. Raises ValueError for wrong ones."""
    file = folder / "block.yaml"
    file.write_text(text)
    data: Any = without_elisions(OmegaConf.to_container(read_yaml(file)))
    is_partial = bool(ELISION.search(text))
    if "type" in data and not is_partial:
        load_config(str(file), [], STAGES[data["type"]])
    elif "stages" in data and not is_partial:
        load_config(str(file), [], Recipe)
    elif "stages" in data:
        for stage in data["stages"].values():
            check_keys(stage, [STAGES[stage["type"]]], may_lack=True)
    elif all(isinstance(part, dict) and "type" in part for part in data.values()):
        for part in data.values():
            if part["type"] in STAGES:
                STAGES[part["type"]].model_validate(part)
            else:
                TypeAdapter(Suite).validate_python(part)
    else:
        check_keys(data, list(STAGES.values()), may_lack=is_partial)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_settings_of_a_page_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "listwise.txt").write_text("{prompt} {answers} \\boxed{7, 3}")
    monkeypatch.chdir(tmp_path)
    check_settings(block.text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "type: sft\nmodel: {path: x}\nstep: 3",
        "lora: {rnk: 3}",
        "name: x\nstages: {a: {type: sft, model: {path: 3}}}  # ...",
        "follow: {type: ifeval, source: {type: file, paths: []}}",
        "rules: [{type: hold, figure: a/b, tolerance: 1:30}]",
    ],
)
def test_wrong_settings_are_noticed(text: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, AssertionError)):
        check_settings(text, tmp_path)


def test_the_smallest_file_of_each_stage_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in blocks("yaml"):
        if block.page.name == "recipes.md" and (name := re.match(r"# (\w+)\.yaml\n", block.text)):
            (tmp_path / f"{name[1]}.yaml").write_text(block.text)
            found[name[1]] = load_config(f"{name[1]}.yaml", [], STAGES[name[1]])
    assert set(found) == set(STAGES)
    for name, loaded in found.items():
        required = {key for key, field in STAGES[name].model_fields.items() if field.is_required()}
        given = {key.partition(".")[0] for key, origin in loaded.origins.items() if origin != "default"}
        assert required <= given and len(given - required) <= 1, f"{name}: {given - required}"  # steps or epochs, read
        if name not in ("rm", "dpo"):  # which read the result of `preferences`
            check_stage(loaded.config)


def test_the_picture_of_the_demo_has_the_edges_of_its_graph() -> None:
    [picture] = [block.text for block in blocks("mermaid") if block.page.name == "recipes.md"]
    stages = graph(load_config("demo", [], Recipe).config)
    edges = {(parent, name) for name, parents in stages.items() for parent in parents}
    assert {*re.findall(r"(\w+) --> (\w+)", picture)} == edges


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_of_a_page_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")
