"""Names of rewards: where each leads, and how the function or class there can be called.

A name is one of ours, an entry point of the group `alignyard.rewards`, `path/to/file.py:name` or `package.module:name`.
Before any of the last three, `trl:`, `verl:` or `openrlhf:` marks a function that was written for this library.

Our own rewards are listed by import path: the libraries of the checkers take 0.4 s (math-verify) to 1.6 s
(reasoning_gym) to import, and only a judging process that uses one should wait for it.

Every fault of a name, a file or a function is a ValueError with the line that it concerns.
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
    "math": "rewards.math.reward:MathReward",
    "reasoning_gym": "rewards.rules.gym:GymReward",
    "code": "rewards.code.reward:CodeReward",
    "instructions": "rewards.rules.instructions:InstructionReward",
    "think_format": "rewards.rules.form:ThinkFormatReward",
    "length": "rewards.rules.form:LengthReward",
    "repetition": "rewards.rules.form:RepetitionReward",
    "language": "rewards.rules.language:LanguageReward",
    "ranking": "rewards.rules.ranking:RankingReward",
    "refusal": "rewards.rules.refusal:refusal",
    "verdict": "rewards.judging.verdict:VerdictReward",
    "judge": "rewards.judging.reward:JudgeReward",
    "reward_model": "pipeline.judging.reward_model:RewardModel",
    "self_judge": "pipeline.judging.self_judge:SelfJudge",
}
"""Import paths of our own rewards; no entry point of the same name hides one. The last two load models, so they lie
above this package, and only the process that builds one imports it."""

LANGUAGE_MODEL, REWARD_MODEL = "language model", "reward model"
MODEL_KINDS: dict[str, str] = {"reward_model": REWARD_MODEL, "self_judge": LANGUAGE_MODEL}
"""Our rewards that load a checkpoint, from their argument `path`, and the kind of model that it must be."""

JUDGE_CACHE_GIB = 1.0
"""KV cache in GiB of the engine of such a reward, if `kv_cache_gib` is not set."""

LIBRARIES = ("trl", "verl", "openrlhf")
"""Libraries whose reward functions run unchanged (`rewards.plugins.adapters`)."""

_PATH_ARGS = ("path", "rubric_file", "cache")
"""Arguments of our own rewards that name files or folders."""
_ENTRY_POINTS = "alignyard.rewards"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a reward: `attribute` of the module or file `where`, written for `library` ("" is for us)."""

    library: str
    where: str
    attribute: str

    @property
    def is_file(self) -> bool:
        """True where `where` is a path, False where it is the name of a module."""
        return self.where.endswith(".py")


@dataclass(frozen=True, slots=True)
class Listing:
    """A reward that needs no path, with its pool and the first paragraph of its docstring."""

    name: str
    pool: str
    summary: str


def locate(name: str) -> Place:
    """The place that `name` leads to; nothing is imported. Raises ValueError for an unknown name.

    Example:
        locate("trl:my/file.py:score") == Place("trl", "my/file.py", "score")
    """
    library, _, rest = name.partition(":")
    if library not in LIBRARIES:
        library, rest = "", name
    if ":" in rest or rest in FACTORIES:
        where, _, attribute = FACTORIES.get(rest, rest).rpartition(":")
    else:
        entry = _entry_point(rest)
        where, attribute = entry.module, entry.attr
    if not where or not attribute:
        raise ValueError(f"reward '{rest}' is half a name: write path/to/file.py:NAME or package.module:NAME")
    return Place(library, where, attribute)


def absolute(spec: RewardSpec) -> RewardSpec:
    """`spec` with absolute paths, for a process with another working directory. Raises ValueError as `locate` does."""
    place = locate(spec.name)
    if spec.name in FACTORIES:
        return spec.model_copy(update={"args": _absolute_args(spec.args)})
    if not place.is_file:
        return spec
    parts = [place.library, str(_path(place.where)), place.attribute]
    return spec.model_copy(update={"name": ":".join(part for part in parts if part)})


def source_file(spec: RewardSpec) -> Path:
    """The file that defines a reward, found without running any of it.

    Raises ValueError where there is no such name, file or module.
    """
    place = locate(spec.name)
    return _existing_file(place.where) if place.is_file else _module_file(place.where)


def import_reward(place: Place) -> Any:
    """The function or class at `place`.

    A file runs once in a process, under a module name made from its path, so that it hides no package and none hides
    it. Raises ValueError, with the line, where nothing is found or the module fails to run.
    """
    module = _run_file(_existing_file(place.where)) if place.is_file else _import(place.where)
    if not hasattr(module, place.attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place.where} has no '{place.attribute}': {neighbour(place.attribute, public)}")
    return getattr(module, place.attribute)


def list_rewards() -> list[Listing]:
    """Our own rewards and those of installed packages. The summary of a broken one is its error."""
    return [_listing(name) for name in dict.fromkeys([*FACTORIES, *entry_points(group=_ENTRY_POINTS).names])]


def describe(function: Any) -> str:
    """The signature of a function or class, with its file and line where it is written in Python."""
    signature = f"{getattr(function, '__qualname__', type(function).__name__)}{inspect.signature(function)}"
    unwrapped = inspect.unwrap(function)
    if not (inspect.isclass(unwrapped) or inspect.isroutine(unwrapped)):
        unwrapped = type(unwrapped).__call__
    try:
        return f"{signature} ({inspect.getsourcefile(unwrapped)}:{inspect.getsourcelines(unwrapped)[1]})"
    except (OSError, TypeError):
        return signature


def describe_error(error: BaseException, file: Path) -> str:
    """`error` with the line of `file` that it concerns or that raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines, message = [error.lineno], error.msg
    where = f"{file}:{lines[-1]}" if lines else str(file)
    return f"{where}: {type(error).__name__}: {message}"


def check_args(function: Any, args: Mapping[str, Any], *, reserved: Collection[str] = ()) -> None:
    """Raises ValueError for the first of `args` that is no parameter of `function`, or one of the `reserved` ones."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds and parameter.name not in reserved]
    for key in args:
        if key not in names:
            raise ValueError(f"args: {unknown_key(key, names)}; see {describe(function)}")


def check_call(function: Any, call: str, *positional: Any, **keywords: Any) -> None:
    """Raises ValueError where `function` does not accept these arguments. call: the call as a person would write it."""
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError as error:
        raise ValueError(f"{describe(function)} can't be called as {call}: {error}") from error


def _entry_point(name: str) -> EntryPoint:
    installed = entry_points(group=_ENTRY_POINTS)
    match list(installed.select(name=name)):
        case [entry]:
            return entry
        case []:
            if name.endswith(".py"):
                remedy = f"add the function or class of the file, as in {name}:NAME"
            elif Path(f"{name}.py").is_file():
                remedy = f"did you mean {name}.py:{name}?"
            else:
                remedy = neighbour(name, [*FACTORIES, *installed.names])
            raise ValueError(f"unknown reward '{name}': {remedy}")
        case several:
            packages = ", ".join(str(entry.dist and entry.dist.name) for entry in several)
            raise ValueError(f"several packages have a reward '{name}': {packages}; name one by its import path")


def _listing(name: str) -> Listing:
    try:
        reward = import_reward(locate(name))
    except ValueError as error:
        return Listing(name, "", str(error))
    paragraph = (inspect.getdoc(reward) or "").partition("\n\n")[0]
    return Listing(name, getattr(reward, "pool", "rule"), " ".join(paragraph.split()))


def _absolute_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Make the paths among the arguments, and among those of a nested model, absolute."""

    def absolute_value(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _absolute_args(value)
        return str(_path(value)) if key in _PATH_ARGS and isinstance(value, str) else value

    return {key: absolute_value(key, value) for key, value in args.items()}


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _existing_file(where: str) -> Path:
    path = _path(where)
    if path.is_file():
        return path
    beside = sorted(str(Path(where).parent / other.name) for other in path.parent.glob("*.py"))
    raise ValueError(f"no file '{where}' (looked from {Path.cwd()}): {neighbour(where, beside)}")


def _module_file(name: str) -> Path:
    """The file of a module. Its packages are not imported, which might take seconds."""
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
        raise ValueError(f"can't be imported: {describe_error(error, file)}") from error


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
        # loader.exec_module would trust compiled code of a file of the same size and second.
        exec(loader.source_to_code(file.read_bytes(), str(file)), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"can't be loaded: {describe_error(error, file)}") from error
    return module
