"""The `truth` of a coding task, read and checked."""

import ast
import builtins
import json
import re
import sys
from collections.abc import Iterator
from symtable import SymbolTable, symtable
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from configs.base import Settings, problems

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_PLAIN_MODULES = {
    *("__future__", "typing", "math", "random", "string", "itertools", "functools", "operator", "copy", "sys"),
    *("cmath", "bisect"),
}
"""Modules that turn plain values into plain values only."""
_UNUSUAL = {
    *("object", "memoryview", "slice", "iter", "map", "zip", "filter", "enumerate", "reversed", "open", "property"),
}
"""Builtins that make other objects than plain values."""
_NAME = re.compile(r"[^\W\d]\w*(\(\)\.[^\W\d]\w*)?")


class Case(Settings):
    """One run of the program."""

    stdin: str = ""
    """Standard input."""
    stdout: str | None = None
    """Expected output, or the answer file of a checker; a checker may do without one."""


class Checker(Settings):
    """A program that judges an output.

    Its arguments are three file names: input, output, answer. It exits with 0 to accept, 1 or 2 to reject. The output
    may be any bytes. The text on stderr, or else on stdout, is shown as the reason. Any other end, such as an uncaught
    exception in Python, rejects the output if that caused it, else it is the checker's own failure
    (`rewards.code.cases.judge_cases`). In other languages an uncaught exception may exit with 1 or 2.
    """

    language: str
    source: str


class Truth(Settings):
    """`task.truth`, in one of three forms: `cases`, `tests` with `entry_point`, or `compile_only`."""

    language: str
    """One of `rewards.sandbox.toolchains.LANGUAGES`."""
    cases: list[Case] = Field(default_factory=list[Case])
    """Runs of the program. Standard output is compared line by line, without trailing blanks and blank lines, and
    decimals are compared as numbers (`rewards.code.cases.same_output`)."""
    checker: Checker | None = None
    """Judges the output of each case instead of that comparison."""
    tests: list[str] = Field(default_factory=list[str])
    """Python source that asserts (MBPP's form), or defines `check(candidate)` that does (HumanEval's); or several."""
    entry_point: list[str] = Field(default_factory=list[str])
    """The function of the solution that the tests call, `f` or `Solution().f`; or several, of which the first is
    HumanEval's candidate."""
    classes: list[str] = Field(default_factory=list[str])
    """Classes of the solution that the tests use. Only then do the solution's objects have attributes."""
    setup: str = ""
    """Trusted source that runs ahead of the tests and may use the solution: HumanEval's prompt, MBPP's test_setup_code.
    The solution sees its imports and its classes, whose objects may be passed both ways. Where it holds a stub of the
    function, as a prompt does, the solution sees all of it but the stub. Secrets of the tests belong in `tests`."""
    compile_only: bool = False
    """Pass a program that compiles."""
    time_limit: float | None = Field(default=None, gt=0)
    """CPU seconds, rounded up, for each case, or for all tests together and their own computing; the reward's
    `seconds` by default."""
    memory_mb: int | None = Field(default=None, ge=16)
    """Memory of the program in MiB; the reward's `memory_mb` by default."""

    @property
    def solution_names(self) -> list[str]:
        """Names of the solution's functions and classes that the tests use."""
        return [name.partition("(")[0] for name in [*self.entry_point, *self.classes]]

    @property
    def shared_setup(self) -> str:
        """The part of the setup that the solution sees."""
        return "\n".join(map(ast.unparse, self._shared()))

    @property
    def shared_names(self) -> list[str]:
        """Global names that the shared setup defines, including its classes."""
        return sorted(global_names(self.shared_setup)[1] - {"*"})

    @property
    def last_stub(self) -> str:
        """Name of the solution's function if the setup ends with it, as a prompt does, else ""."""
        body = ast.parse(self.setup).body
        last = body[-1] if body else None
        if isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) and last.name in self.solution_names:
            return last.name
        return ""

    @property
    def may_pass_objects(self) -> bool:
        """True if the tests may pass values to the solution, or expect values of it, that are not plain."""
        if not self.tests:
            return False
        trees = [ast.parse(source) for source in [self.setup, *self.tests]]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        imported = {name for node in nodes for name in _modules(node)}
        unusual = any(isinstance(node, ast.Name) and node.id in _UNUSUAL for node in nodes)
        return unusual or bool(imported - _PLAIN_MODULES) or any(isinstance(node, ast.ClassDef) for node in nodes)

    def _shared(self) -> Iterator[ast.stmt]:
        names = {*self.solution_names}
        body = ast.parse(self.setup).body
        is_prompt = any(isinstance(node, _DEFINITIONS) and node.name in names for node in body)
        for node in body:
            if isinstance(node, _DEFINITIONS):
                shared = node.name not in names and (is_prompt or isinstance(node, ast.ClassDef))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                shared = True
            else:
                used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                shared = is_prompt and not used & names
            if shared:
                yield node

    @field_validator("tests", "entry_point", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = {"cases": self.cases, "tests": self.tests, "compile_only": self.compile_only}
        used = [name for name, value in forms.items() if value]
        if len(used) != 1:
            raise ValueError(f"give one of cases, tests and compile_only: true; got {' and '.join(used) or 'none'}")
        if self.checker and not self.cases:
            raise ValueError("checker: it judges the output of cases, and there are none")
        if self.cases and not self.checker:
            for number, case in enumerate(self.cases):
                if case.stdout is None:
                    raise ValueError(f"cases.{number}.stdout: missing; give what is to be printed, or a checker")
            if not any((case.stdout or "").strip() for case in self.cases):
                raise ValueError("cases: every stdout is blank, so a program that prints nothing passes; give outputs")
        if self.tests:
            self._check_tests()
        elif self.entry_point or self.classes or self.setup:
            raise ValueError("entry_point, classes and setup belong to tests, and there are none")
        return self

    def _check_tests(self) -> None:
        """Raises ValueError for tests that a solution could cheat, that cannot run, or that test nothing."""
        if self.language != "python":
            raise ValueError(
                f"tests: not for {self.language}, where they would run in the solution's process and it could answer "
                "for them; write cases, or cases with a checker"
            )
        solution = [*self.entry_point, *self.classes]
        if not solution:
            raise ValueError("entry_point: missing; name the function of the solution that the tests call")
        for name in solution:
            if not _NAME.fullmatch(name):
                raise ValueError(f"entry_point and classes: '{name}' is neither a name nor of the form Solution().name")
        try:
            used, defined = global_names("\n".join([self.setup, *self.tests]))
        except SyntaxError as error:
            raise ValueError(f"tests: {error}: {(error.text or '').strip()[:80]!r}") from error
        if not used & {*solution} and "check" not in defined:
            raise ValueError(
                f"tests: they neither call '{solution[0]}' nor define check(candidate), so they test nothing"
            )
        modules = {name for source in (self.setup, *self.tests) for name in _required_modules(ast.parse(source))}
        if missing := modules - sys.stdlib_module_names:
            raise ValueError(
                f"tests: {', '.join(sorted(missing))} can't be imported: a sandbox has Python's standard library only"
            )
        unknown = used - defined - {*solution} - {*dir(builtins)}
        if unknown and "*" not in defined:
            # Taken from the solution unlisted, such a name could be a checking function of its own.
            raise ValueError(
                f"tests: {', '.join(sorted(unknown))} is defined nowhere; define or import it in tests or setup, or "
                "list it in entry_point or classes if the solution is to define it"
            )


def read_truth(truth: Any) -> Truth:
    """Read and check `truth`, a dict or the same as JSON. None counts as absent, since tables fill it in.

    Raises ValueError with the key, the value and the remedy.

    Example:
        read_truth('{"language": "c", "compile_only": true}').compile_only  # True
    """
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(f"truth: not JSON ({error}): {truth[:80]!r}") from error
    if not isinstance(truth, dict):
        raise ValueError(f"truth: expected an object with language and cases, tests or compile_only, got {truth!r:.80}")
    values = {key: value for key, value in truth.items() if value is not None}
    try:
        return Truth(**values)
    except ValidationError as error:
        message = "; ".join(f"truth.{key}: {text}" for key, text in problems(error, values))
        raise ValueError(message.replace("truth.(root): ", "truth: ")) from error


def _required_modules(tree: ast.AST) -> set[str]:
    """Return the modules that a program imports outside of `try`, so that it needs them."""
    if isinstance(tree, ast.Try):
        return set()
    return _modules(tree).union(*map(_required_modules, ast.iter_child_nodes(tree)))


def _modules(node: ast.AST) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return {name.partition(".")[0] for name in names}


def global_names(source: str) -> tuple[set[str], set[str]]:
    """Return the global names that `source` uses and those it defines, with "*" for `import *`.

    Raises SyntaxError if it is no Python, and the other errors of `compile`.

    Example:
        global_names("import re; x = f(re)")  # ({"f", "re"}, {"re", "x"})
    """
    used: set[str] = set()
    defined: set[str] = {"*"} if "import *" in source else set()
    tables: list[SymbolTable] = [symtable(source, "<source>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                defined |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return used, defined
