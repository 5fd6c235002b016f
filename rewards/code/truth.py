"""What a task of code is judged by: its `truth`, read and checked."""

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
"""Modules whose functions and types leave plain values plain."""
_UNUSUAL = {
    *("object", "memoryview", "slice", "iter", "map", "zip", "filter", "enumerate", "reversed", "open", "property"),
}
"""Builtins that make objects which are no plain values."""
_NAME = re.compile(r"[^\W\d]\w*(\(\)\.[^\W\d]\w*)?")


class Case(Settings):
    """One run of the program."""

    stdin: str = ""
    """What it is given on its standard input."""
    stdout: str | None = None
    """What it has to print; the answer file of a checker, which may do without one."""


class Checker(Settings):
    """A program that judges an output.

    It is called `checker input output answer`, three names of files, and exits with 0 to accept, 1 or 2 to reject; any
    other end is the checker's own failure, as is an exception in Python. Elsewhere what nobody catches may end it with
    1 or 2 too, so catch it. The output is whatever the program wrote: read bytes. The first line on stdout or stderr is
    shown as the reason.
    """

    language: str
    source: str


class Truth(Settings):
    """`task.truth`, in one of three forms: `cases`, `tests` with `entry_point`, or `compile_only`."""

    language: str
    """One of `rewards.sandbox.toolchains.LANGUAGES`."""
    cases: list[Case] = Field(default_factory=list[Case])
    """Runs of the program; standard output is compared line by line, trailing blanks and blank lines aside, and
    decimals as numbers (`rewards.code.cases.same_output`)."""
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
    """Whether to compile is all that is asked."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds of processor time, rounded up, for each case, or for all tests together with what the tests themselves
    compute; the reward's own where there is none."""
    memory_mb: int | None = Field(default=None, ge=16)
    """MiB the program may take; the reward's own where there is none."""

    @property
    def solution_names(self) -> list[str]:
        """The solution's functions and classes that the tests use, as the solution defines them."""
        return [name.partition("(")[0] for name in [*self.entry_point, *self.classes]]

    @property
    def shared_setup(self) -> str:
        """The part of the setup that the solution sees."""
        return "\n".join(map(ast.unparse, self._shared()))

    @property
    def shared_names(self) -> list[str]:
        """Global names that the shared setup defines, those of its classes among them."""
        return sorted(global_names(self.shared_setup)[1] - {"*"})

    @property
    def last_stub(self) -> str:
        """The solution's function that the setup ends with, as a prompt does; "" where it ends otherwise."""
        body = ast.parse(self.setup).body
        last = body[-1] if body else None
        if isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) and last.name in self.solution_names:
            return last.name
        return ""

    @property
    def may_pass_objects(self) -> bool:
        """True where the tests may pass values to the solution, or expect values of it, that are not plain."""
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
        given = [name for name, value in forms.items() if value]
        if len(given) != 1:
            raise ValueError(f"give one of cases, tests and compile_only: true; got {' and '.join(given) or 'none'}")
        if self.checker and not self.cases:
            raise ValueError("checker: it judges the output of cases, and there are none")
        if self.cases and not self.checker:
            for number, case in enumerate(self.cases):
                if case.stdout is None:
                    raise ValueError(f"cases.{number}.stdout: missing; give what is to be printed, or a checker")
        if self.tests:
            self._check_tests()
        elif self.entry_point or self.classes or self.setup:
            raise ValueError("entry_point, classes and setup belong to tests, and there are none")
        return self

    def _check_tests(self) -> None:
        """Raises ValueError for tests that could be cheated, could not run, or would test nothing."""
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
        lacking = {name for source in (self.setup, *self.tests) for name in _required_modules(ast.parse(source))}
        if lacking := lacking - sys.stdlib_module_names:
            raise ValueError(
                f"tests: {', '.join(sorted(lacking))} can't be imported: a sandbox has Python's standard library only"
            )
        unknown = used - defined - {*solution} - {*dir(builtins)}
        if unknown and "*" not in defined:
            # Names are not taken from the solution unasked: a checking function it happens to define would be its own.
            raise ValueError(
                f"tests: {', '.join(sorted(unknown))} is defined nowhere; define or import it in tests or setup, or "
                "list it in entry_point or classes if the solution is to define it"
            )


def read(truth: Any) -> Truth:
    """`truth`, a dict or the same as JSON, checked. Keys that are None count as absent, as tables fill them in.

    Raises ValueError with the key, the value and the remedy.
    """
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(f"truth: not JSON ({error}): {truth[:80]!r}") from error
    if not isinstance(truth, dict):
        raise ValueError(f"truth: expected an object with language and cases, tests or compile_only, got {truth!r:.80}")
    given = {key: value for key, value in truth.items() if value is not None}
    try:
        return Truth(**given)
    except ValidationError as error:
        said = "; ".join(f"truth.{key}: {message}" for key, message in problems(error, given))
        raise ValueError(said.replace("truth.(root): ", "truth: ")) from error


def _required_modules(tree: ast.AST) -> set[str]:
    """Modules that a program imports outside of `try`, so that it can't do without them."""
    if isinstance(tree, ast.Try):
        return set()
    return _modules(tree).union(*map(_required_modules, ast.iter_child_nodes(tree)))


def _modules(node: ast.AST) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return {name.partition(".")[0] for name in names}


def global_names(source: str) -> tuple[set[str], set[str]]:
    """Global names that `source` uses and that it defines; "*" among these for an import of everything.

    Raises SyntaxError where it is no Python, and the other errors of `compile`.
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
