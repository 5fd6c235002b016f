"""What the name of a reward stands for, where that is written, and how it can be called.

A name is one of ours, an entry point of the group `alignyard.rewards`, `path/to/file.py:name` or `package.module:name`;
before any of the last three, `trl:`, `verl:` or `openrlhf:` says which library it was written for.

Ours are written down as where to find them: the checkers' libraries take 0.4 s (math-verify) to 1.6 s (reasoning_gym)
to import, and only the judging process that uses one should wait for it.

Whatever is wrong with a name, a file or a function is a ValueError with the line it is about.
"""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from configs.base import neighbour, unknown_key
from configs.rewards import RewardSpec

FACTORIES: dict[str, str] = {
    "math": "rewards.math:MathReward",
    "reasoning_gym": "rewards.gym:GymReward",
    "code": "rewards.code.reward:CodeReward",
    "instructions": "rewards.instructions:InstructionReward",
    "think_format": "rewards.form:ThinkFormatReward",
    "length": "rewards.form:LengthReward",
    "repetition": "rewards.form:RepetitionReward",
    "language": "rewards.language:LanguageReward",
    "ranking": "rewards.ranking:RankingReward",
    "refusal": "rewards.refusal:refusal",
    "judge": "rewards.judge:JudgeReward",
    "reward_model": "pipeline.judging.reward_model:RewardModel",
    "self_judge": "pipeline.judging.self_judge:SelfJudge",
}
"""Our own rewards. None of them can be hidden by an entry point of the same name. Two load models, and so
lie above this room: only the process that builds one goes there."""

_PATHS = ("path", "rubric_file", "cache")
"""Arguments of our own rewards that name files or folders."""

LIBRARIES = ("trl", "verl", "openrlhf")
"""Whose functions can be run unchanged (`rewards.adapters`)."""

_GROUP = "alignyard.rewards"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name leads: `attribute` of the module or file `where`, written for `library` ("" is for us)."""

    library: str
    where: str
    attribute: str

    @property
    def is_file(self) -> bool:
        """Whether `where` is a path and not the name of a module."""
        return self.where.endswith(".py")


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of what can be named without a path: the pool it runs in, and its docstring's first
    paragraph."""

    name: str
    pool: str
    summary: str


def locate(name: str) -> Place:
    """Where `name` leads, without a look at what is there. Raises ValueError for a name that leads nowhere."""
    library, _, rest = name.partition(":")
    if library not in LIBRARIES:
        library, rest = "", name
    if ":" in rest:
        where, _, attribute = rest.rpartition(":")
    elif rest in FACTORIES:
        where, _, attribute = FACTORIES[rest].partition(":")
    else:
        entry = _entry_point(rest)
        where, attribute = entry.module, entry.attr
    if not where or not attribute:
        raise ValueError(f"reward '{rest}' is half a name: write path/to/file.py:NAME or package.module:NAME")
    return Place(library, where, attribute)


def absolute(spec: RewardSpec) -> RewardSpec:
    """`spec` with the paths in it made absolute: what may cross to a process that works in another folder.

    Raises ValueError for a name that leads nowhere.
    """
    place = locate(spec.name)
    if spec.name in FACTORIES:
        paths = {key: value for key, value in spec.args.items() if key in _PATHS and isinstance(value, str)}
        there = {key: str(Path(value).expanduser().absolute()) for key, value in paths.items()}
        return spec.model_copy(update={"args": spec.args | there})
    if not place.is_file:
        return spec
    parts = [place.library, str(Path(place.where).expanduser().absolute()), place.attribute]
    return spec.model_copy(update={"name": ":".join(part for part in parts if part)})


def source_file(spec: RewardSpec) -> Path:
    """The file a reward is written in, found without running any of it.

    Raises ValueError where there is no such name, file or module.
    """
    place = locate(spec.name)
    return _file(place.where) if place.is_file else _module_file(place.where)


def load(place: Place) -> Any:
    """What is there: a function or a class, usually.

    A file is run once in a process, under a module name made from its path: it neither hides a package nor is hidden
    by one. Raises ValueError where it is not found, or where running its module raises, with the line.
    """
    module = _run_file(_file(place.where)) if place.is_file else _import(place.where)
    if not hasattr(module, place.attribute):
        has = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place.where} has no '{place.attribute}': {neighbour(place.attribute, has)}")
    return getattr(module, place.attribute)


def names() -> list[Listing]:
    """Our own rewards and those of installed packages. One that can't be loaded says why in its summary."""
    return [_listing(name) for name in dict.fromkeys([*FACTORIES, *entry_points(group=_GROUP).names])]


def describe(thing: Any) -> str:
    """`thing` as its author finds it again: its name and parameters, with file and line."""
    name = getattr(thing, "__qualname__", type(thing).__name__)
    function = inspect.unwrap(thing)
    if not (inspect.isclass(function) or inspect.isroutine(function)):
        function = type(function).__call__
    try:
        line = inspect.getsourcelines(function)[1]
    except (OSError, TypeError):  # not written in Python
        return f"{name}{inspect.signature(thing)}"
    return f"{name}{inspect.signature(thing)} ({inspect.getsourcefile(function)}:{line})"


def fault(error: BaseException, file: Path) -> str:
    """`error` in words, with the line of `file` that it is about or that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines, message = [error.lineno], error.msg
    where = f"{file}:{lines[-1]}" if lines else str(file)
    return f"{where}: {type(error).__name__}: {message}"


def check_args(thing: Any, args: Mapping[str, Any], *, given: Collection[str] = ()) -> None:
    """Raises ValueError for the first of `args` that `thing` has no parameter for; those `given` are not for args."""
    parameters = inspect.signature(thing).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [each.name for each in parameters if each.kind in named and each.name not in given]
    for key in args:
        if key not in known:
            raise ValueError(f"args: {unknown_key(key, known)}; see {describe(thing)}")


def check_call(function: Any, form: str, *positional: Any, **keywords: Any) -> None:
    """Raises ValueError where `function` can't be called so; `form` is the call as a person would write it."""
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError as error:
        raise ValueError(f"{describe(function)} can't be called as {form}: {error}") from error


def _entry_point(name: str) -> EntryPoint:
    found = entry_points(group=_GROUP)
    match list(found.select(name=name)):
        case [entry]:
            return entry
        case []:
            raise ValueError(f"unknown reward '{name}': {_remedy(name, [*FACTORIES, *found.names])}")
        case several:
            packages = ", ".join(str(entry.dist and entry.dist.name) for entry in several)
            raise ValueError(f"several packages have a reward '{name}': {packages}; name one by its import path")


def _remedy(name: str, known: list[str]) -> str:
    """What to write in place of a name that is none."""
    if name.endswith(".py"):
        return f"say which function or class of the file, as in {name}:NAME"
    return f"did you mean {name}.py:{name}?" if Path(f"{name}.py").is_file() else neighbour(name, known)


def _listing(name: str) -> Listing:
    try:
        thing = load(locate(name))
    except ValueError as error:
        return Listing(name, "", str(error))
    paragraph = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    return Listing(name, getattr(thing, "pool", "rule"), " ".join(paragraph.split()))


def _file(where: str) -> Path:
    path = Path(where).expanduser().absolute()
    if path.is_file():
        return path
    beside = sorted(str(Path(where).parent / other.name) for other in path.parent.glob("*.py"))
    raise ValueError(f"no file '{where}' (looked from {Path.cwd()}): {neighbour(where, beside)}")


def _module_file(name: str) -> Path:
    """The file of a module. Its packages aren't imported on the way, which might take seconds."""
    first, *below = name.split(".")
    spec = find_spec(first) if first else None
    for part in below:
        if spec is not None:
            spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.has_location:
        raise ValueError(f"no module '{name}' is installed; a file is named by its path, as in ./{first}.py:NAME")
    return Path(spec.origin)


def _import(name: str) -> ModuleType:
    file = _module_file(name)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"can't be imported: {fault(error, file)}") from error


def _run_file(file: Path) -> ModuleType:
    name = f"alignyard_plugin_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(file))
    spec = spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        # Not loader.exec_module: it trusts compiled code of the same size and second as the file.
        exec(loader.source_to_code(file.read_bytes(), str(file)), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"can't be loaded: {fault(error, file)}") from error
    return module
