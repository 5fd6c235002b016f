"""Languages that programs may be written in, and the toolchains of this machine that compile and run them.

LANGUAGES has one row a language: the commands as templates, and a function that locates the toolchain.
"""

import functools
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.base import neighbour
from rewards.sandbox.bubblewrap import SYSTEM, Runtime
from rewards.sandbox.process import Limits

COMPILE = Limits(seconds=30, memory_mb=1024, output_kb=256, disk_mb=256)
"""Limits of the compilers of trusted programs."""
INTEGERS = ("-X", "int_max_str_digits=0")
"""Lets Python print integers of any length; the limits of time and memory hold anyway."""

_QUERY_SECONDS = 60.0
_PROCESSORS = 4
"""Processors shown to runtimes that start threads for each: on a large machine they would pass `Limits.processes`."""
_JVM = f"-XX:+UseSerialGC -Xshare:auto -XX:ReservedCodeCacheSize=64m -XX:ActiveProcessorCount={_PROCESSORS}"
_JAVAC_JVM = " ".join(f"-J{option}" for option in f"{_JVM} -XX:TieredStopAtLevel=1 -Xmx512m".split())
_JAVAC = f"{{home}}/bin/javac {_JAVAC_JVM} -proc:none -encoding UTF-8 -d . {{file}}"
_RUN_JAVA = f"{{home}}/bin/java {_JVM} -Xmx{{memory_mb}}m -Xss64m -cp . {{main}}"
_RUN_NODE = "{executable} --max-old-space-size={memory_mb} {file}"
_STRIP_TYPES = "{executable} --no-warnings -e {script} main.ts {file}"
_JAVA_PACKAGE = re.compile(r"^\s*package\s+([\w.]+)\s*;", re.M)
_JAVA_TYPE = r"(?:class|interface|enum|record)\s+(\w+)"
_JAVA_PUBLIC = re.compile(rf"^public\s+(?:(?:final|abstract|sealed|strictfp)\s+)*{_JAVA_TYPE}", re.M)
_JAVA_CLASS = re.compile(rf"^(?:(?:final|abstract|strictfp)\s+)*{_JAVA_TYPE}", re.M)
_JAVA_MAIN = re.compile(r"\bstatic\s+(?:final\s+)?void\s+main\b")
_JS_MODULE = re.compile(r"^\s*(?:import\s+[\w{*'\"]|export\s+[\w{*])", re.M)
_PYTHON_CHECK = "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')"
_TRANSPILE = """
const fs = require('fs'), ts = require('{module}'), [from, to] = process.argv.slice(1);
const options = {{ target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext }};
const source = fs.readFileSync(from, 'utf8');
const result = ts.transpileModule(source, {{ compilerOptions: options, fileName: from, reportDiagnostics: true }});
const host = {{ getCanonicalFileName: (name) => name, getCurrentDirectory: () => '', getNewLine: () => '\\n' }};
if (result.diagnostics.length) {{ console.error(ts.formatDiagnostics(result.diagnostics, host)); process.exit(1); }}
fs.writeFileSync(to, result.outputText);
"""
_STRIP = """
const fs = require('fs'), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, require('module').stripTypeScriptTypes(fs.readFileSync(from, 'utf8'), { mode: 'transform' }));
"""


@dataclass(frozen=True, slots=True)
class Program:
    """A source file and its commands, in the folder it lies in.

    file: name to write the source under. compile: command that checks it and builds what `run` needs. run: command that
    runs it, any number of times. interpreted: the whole file is parsed before any of it runs, so `compile` is needed
    only to explain a failed run.
    """

    file: str
    compile: list[str]
    run: list[str]
    interpreted: bool


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A language's compiler or interpreter on this machine.

    compiling, running: needs of either in the box. fields: values for the language's command templates.
    """

    executable: Path
    compiling: Runtime
    running: Runtime
    fields: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Language:
    """A row of LANGUAGES.

    package: Debian package of the toolchain. command: its command on PATH. toolchain: returns the toolchain of that
    command, None for one that lacks a part; raises ValueError for one that cannot be used. file, compile, run: as in
    `Program`, but templates with the fields {executable}, {memory_mb}, those of the toolchain and those that `names`
    finds in the source.
    """

    package: str
    command: str
    toolchain: Callable[[Path], Toolchain | None]
    file: str
    compile: str
    run: str
    interpreted: bool = False
    names: Callable[[str], dict[str, str]] = lambda _: {}

    def locate(self) -> Toolchain | None:
        """Return the toolchain, or None where it is not installed. Raises ValueError if it cannot be used."""
        path = shutil.which(self.command)
        return self.toolchain(Path(path)) if path else None


@functools.cache
def find_toolchain(language: str) -> Toolchain:
    """Return the toolchain of one of LANGUAGES.

    Raises ValueError for any other language, for a missing toolchain, with the package to install, and for one that
    cannot be used.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language: '{language}' is not offered: {neighbour(language, list(LANGUAGES))}")
    toolchain = LANGUAGES[language].locate()
    if toolchain is None:
        package = LANGUAGES[language].package
        raise ValueError(f"language: this machine has no toolchain for '{language}'; install {package}")
    return toolchain


def plan_program(language: str, source: str, memory_mb: int) -> Program:
    """Return the file and the commands for a source that will run with `memory_mb`.

    Example:
        plan_program("c", source, 256).run  # ["./main"]
    """
    toolchain = find_toolchain(language)
    row = LANGUAGES[language]
    fields = {"executable": str(toolchain.executable), "memory_mb": str(memory_mb)}
    fields |= toolchain.fields | row.names(source)
    compile, run = ([word.format(**fields) for word in command.split()] for command in (row.compile, row.run))
    return Program(row.file.format(**fields), compile, run, row.interpreted)


def _python(command: Path) -> Toolchain:
    """Return the interpreter of this process, with the standard library alone."""
    base = Path(sys.base_prefix).resolve()
    packages = [Path(folder) for folder in site.getsitepackages([str(base)])]
    runtime = Runtime(_outside_system(base), tuple(filter(Path.is_dir, packages)), extra_mb=32)
    return Toolchain(command.resolve(), runtime, runtime, {"check": _PYTHON_CHECK})


def _gcc(command: Path) -> Toolchain:
    compiling = _prefix_runtime(command.resolve().parents[1])
    return Toolchain(command, compiling, replace(compiling, extra_mb=16, stack_mb=64))


def _rust(command: Path) -> Toolchain:
    root = Path(_query(command, "--print", "sysroot")).resolve()  # `command` may be rustup's, which needs a home
    return Toolchain(root / "bin/rustc", Runtime(_outside_system(root)), Runtime(extra_mb=16, stack_mb=64))


def _go(command: Path) -> Toolchain:
    root = Path(_query(command, "env", "GOROOT")).resolve()
    settings = {"GOCACHE": "/tmp/go", "GOPATH": "/tmp/path", "GO111MODULE": "off", "CGO_ENABLED": "0"}
    settings |= {"GOTOOLCHAIN": "local", "GOROOT": str(root), "GOFLAGS": "-buildvcs=false"}
    processors = {"GOMAXPROCS": str(_PROCESSORS)}
    compiling = Runtime(_outside_system(root), environment=settings | processors)
    return Toolchain(root / "bin/go", compiling, Runtime(environment=processors, extra_mb=96))


def _java(command: Path) -> Toolchain:
    home = command.resolve().parents[1]
    settings = {(home / file).resolve().parent for file in ("lib/jvm.cfg", "conf/net.properties")}  # links into /etc
    paths = _outside_system(home, *(folder for folder in settings if not folder.is_relative_to(home)))
    # The virtual machine starts a dozen threads, and each counts with its whole stack.
    return Toolchain(command, Runtime(paths), Runtime(paths, extra_mb=1024), {"home": str(home)})


def _java_names(source: str) -> dict[str, str]:
    """Return the file name that javac expects and the class to start: the public one, or the last before `main`."""
    package, public, main = (pattern.search(source) for pattern in (_JAVA_PACKAGE, _JAVA_PUBLIC, _JAVA_MAIN))
    classes = _JAVA_CLASS.findall(source, 0, main.start() if main else len(source))
    name = public[1] if public else classes[-1] if classes else "Main"
    return {"file": f"{name}.java", "main": f"{package[1]}.{name}" if package else name}


def _node(command: Path) -> Toolchain:
    """Return node; the box sees its one file, or its prefix too where its libraries lie there."""
    node = Path(_query(command, "-p", "process.execPath")).resolve()
    prefix = node.parents[1]
    libraries = _query(node, "-p", "process.report.getReport().sharedObjects.join('\\n')").splitlines()
    alone = not any(Path("/", library).resolve().is_relative_to(prefix) for library in libraries)
    runtime = replace(Runtime(_outside_system(node)) if alone else _prefix_runtime(prefix), extra_mb=320)
    return Toolchain(node, runtime, runtime)


def _typescript(command: Path) -> Toolchain | None:
    """Return node with a script that drops types unchecked, by the compiler's module or else by node itself."""
    node, tsc = _node(command), shutil.which("tsc")
    module = Path(tsc).resolve().parents[1] / "lib/typescript.js" if tsc else None
    if module and module.exists():
        compiling = replace(node.running, paths=node.running.paths + _outside_system(module))
        return replace(node, compiling=compiling, fields={"script": _TRANSPILE.format(module=str(module))})
    can_strip = _query(node.executable, "-p", "typeof require('module').stripTypeScriptTypes") == "function"
    return replace(node, fields={"script": _STRIP}) if can_strip else None


def _js_names(source: str) -> dict[str, str]:
    return {"file": "main.mjs" if _JS_MODULE.search(source) else "main.js"}


def _bash(command: Path) -> Toolchain:
    return Toolchain(command, SYSTEM, Runtime(extra_mb=16))


def _query(command: Path, *arguments: str) -> str:
    """Return a toolchain's answer about itself. Raises ValueError if it is broken."""
    try:
        result = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"language: {command} doesn't work: {error}; repair or reinstall it") from error
    return result.stdout.strip()


def _prefix_runtime(prefix: Path) -> Runtime:
    """Return a runtime that sees all below `prefix`, which may be a virtual environment, but no Python packages."""
    paths = _outside_system(prefix)
    packages = {folder.resolve() for path in paths for folder in path.glob("lib*/python3*/*-packages")}
    return Runtime(paths, hidden=tuple(sorted(packages)))


def _outside_system(*paths: Path) -> tuple[Path, ...]:
    """Return the paths outside /usr, which every box has. Raises ValueError for one that holds the user's home."""
    outside = tuple(path for path in paths if not path.is_relative_to("/usr"))
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111  Path.home() raises for a user who has none
    for path in outside:
        if home.is_relative_to(path):
            raise ValueError(
                f"language: a toolchain lies in {path}, which holds your home, so that judged programs would read it; "
                "install the toolchain in a folder of its own"
            )
    return outside


LANGUAGES = {
    "python": Language(
        "python3",
        sys._base_executable,  # type: ignore[attr-defined]
        _python,
        "main.py",
        "{executable} -IS -c {check} main.py",
        " ".join(["{executable} -IB", *INTEGERS, "main.py"]),
        interpreted=True,
    ),
    "c": Language("gcc", "gcc", _gcc, "main.c", "{executable} -O2 -std=gnu17 -pipe -o main main.c -lm", "./main"),
    "cpp": Language(
        "g++", "g++", _gcc, "main.cpp", "{executable} -O2 -std=gnu++20 -pipe -o main main.cpp -lm", "./main"
    ),
    "rust": Language("rustc", "rustc", _rust, "main.rs", "{executable} -O --edition=2021 -o main main.rs", "./main"),
    "go": Language("golang-go", "go", _go, "main.go", "{executable} build -o main main.go", "./main"),
    "java": Language("default-jdk-headless", "javac", _java, "{file}", _JAVAC, _RUN_JAVA, names=_java_names),
    "javascript": Language(
        "nodejs", "node", _node, "{file}", "{executable} --check {file}", _RUN_NODE, interpreted=True, names=_js_names
    ),
    "typescript": Language("node-typescript", "node", _typescript, "main.ts", _STRIP_TYPES, _RUN_NODE, names=_js_names),
    "bash": Language("bash", "bash", _bash, "main.sh", "{executable} -n main.sh", "{executable} main.sh"),
}
"""Keys are the names that tasks use."""
