"""The languages a program may come in, and what compiles and runs them on this machine."""

import functools
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from configs.base import neighbour
from rewards.sandbox.bubblewrap import SYSTEM, Runtime
from rewards.sandbox.process import Limits

COMPILE = Limits(seconds=30, memory_mb=1024, output_kb=256, disk_mb=256)
"""For compilers."""

INTEGERS = ("-X", "int_max_str_digits=0")
"""Has Python print integers of any length; what that takes counts against the limits of time and memory."""

_ASK_SECONDS = 60.0
_PROCESSORS = 4
"""That runtimes believe in which start threads for each: on a large machine they would pass `Limits.processes`."""
_JAVA_PACKAGE = re.compile(r"^\s*package\s+([\w.]+)\s*;", re.M)
_JAVA_PUBLIC = re.compile(
    r"^public\s+(?:(?:final|abstract|sealed|strictfp)\s+)*(?:class|interface|enum|record)\s+(\w+)", re.M
)
_JAVA_CLASS = re.compile(r"^(?:(?:final|abstract|strictfp)\s+)*(?:class|interface|enum|record)\s+(\w+)", re.M)
_JAVA_MAIN = re.compile(r"\bstatic\s+(?:final\s+)?void\s+main\b")
_TRANSPILE = """
const fs = require('fs'), ts = require('{module}'), [from, to] = process.argv.slice(1);
const options = {{ target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext }};
const source = fs.readFileSync(from, 'utf8');
const made = ts.transpileModule(source, {{ compilerOptions: options, fileName: from, reportDiagnostics: true }});
const host = {{ getCanonicalFileName: (name) => name, getCurrentDirectory: () => '', getNewLine: () => '\\n' }};
if (made.diagnostics.length) {{ console.error(ts.formatDiagnostics(made.diagnostics, host)); process.exit(1); }}
fs.writeFileSync(to, made.outputText);
"""
_STRIP = """
const fs = require('fs'), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, require('module').stripTypeScriptTypes(fs.readFileSync(from, 'utf8'), { mode: 'transform' }));
"""
_JS_MODULE = re.compile(r"^\s*(?:import\s+[\w{*'\"]|export\s+[\w{*])", re.M)


@dataclass(frozen=True, slots=True)
class Program:
    """A source and what to do with it, in the folder it lies in.

    file: the name to write it under. compile: the command that checks it and makes what `run` needs. run: the command
    that runs it, as often as one likes. interpreted: whether the whole file is parsed before any of it runs, so that
    `compile` need only be asked when a run fails.
    """

    file: str
    compile: list[str]
    run: list[str]
    interpreted: bool = False


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What compiles and runs one language, as found on this machine.

    executable: the compiler or interpreter. compiling, running: what each needs in its box. plan: what to do with a
    source, given the MiB of `Limits.memory_mb` it will run with.
    """

    language: str
    executable: Path
    compiling: Runtime
    running: Runtime
    plan: Callable[[str, int], Program]


@dataclass(frozen=True, slots=True)
class Language:
    """A language that may be had.

    look: its toolchain if it is here; raises ValueError where it is and cannot be used. package: Debian's name of what
    it takes.
    """

    look: Callable[[], Toolchain | None]
    package: str


@functools.cache
def find(language: str) -> Toolchain:
    """The toolchain of one of LANGUAGES.

    Raises ValueError for any other language, for a toolchain that is missing, with the package to install, and for one
    that cannot be used.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language: '{language}' is not offered: {neighbour(language, list(LANGUAGES))}")
    toolchain = LANGUAGES[language].look()
    if toolchain is None:
        raise ValueError(
            f"language: this machine has no toolchain for '{language}'; install {LANGUAGES[language].package}"
        )
    return toolchain


def found() -> list[Toolchain]:
    """The toolchains that are here and can be used."""
    toolchains: list[Toolchain | None] = []
    for language in LANGUAGES.values():
        with suppress(ValueError):
            toolchains.append(language.look())
    return [toolchain for toolchain in toolchains if toolchain]


def _python() -> Toolchain:
    """The interpreter this process runs on, with the standard library alone."""
    executable, base = Path(sys._base_executable).resolve(), Path(sys.base_prefix).resolve()  # type: ignore[attr-defined]
    packages = [Path(folder) for folder in site.getsitepackages([str(base)])]
    runtime = Runtime(_outside_system(base), tuple(filter(Path.is_dir, packages)), extra_mb=32)
    check = "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')"
    python = str(executable)
    plan = Program(
        "main.py", [python, "-IS", "-c", check, "main.py"], [python, "-IB", *INTEGERS, "main.py"], interpreted=True
    )
    return Toolchain("python", executable, runtime, runtime, lambda _source, _memory_mb: plan)


def _gcc(language: str, command: str, standard: str) -> Toolchain | None:
    executable = _which(command)
    if executable is None:
        return None
    file = f"main.{language}"
    plan = Program(file, [str(executable), "-O2", f"-std={standard}", "-pipe", "-o", "main", file, "-lm"], ["./main"])
    compiling = _prefix_runtime(executable.resolve().parents[1])
    running = replace(compiling, extra_mb=16, stack_mb=64)
    return Toolchain(language, executable, compiling, running, lambda _source, _memory_mb: plan)


def _rust() -> Toolchain | None:
    command = _which("rustc")
    if command is None:
        return None
    root = Path(_ask([str(command), "--print", "sysroot"])).resolve()  # the command may be rustup's, of a user's home
    compiler = [str(root / "bin/rustc"), "-O", "--edition=2021", "-o", "main", "main.rs"]
    plan = Program("main.rs", compiler, ["./main"])
    compiling, running = Runtime(_outside_system(root)), Runtime(extra_mb=16, stack_mb=64)
    return Toolchain("rust", root / "bin/rustc", compiling, running, lambda _source, _memory_mb: plan)


def _go() -> Toolchain | None:
    command = _which("go")
    if command is None:
        return None
    root = Path(_ask([str(command), "env", "GOROOT"])).resolve()
    executable = root / "bin/go"
    settings = {"GOCACHE": "/tmp/go", "GOPATH": "/tmp/path", "GO111MODULE": "off", "CGO_ENABLED": "0"}
    settings |= {"GOTOOLCHAIN": "local", "GOROOT": str(root), "GOFLAGS": "-buildvcs=false"}
    processors = {"GOMAXPROCS": str(_PROCESSORS)}
    compiling = Runtime(_outside_system(root), environment=settings | processors)
    plan = Program("main.go", [str(executable), "build", "-o", "main", "main.go"], ["./main"])
    running = Runtime(environment=processors, extra_mb=96, stack_mb=8)
    return Toolchain("go", executable, compiling, running, lambda _source, _memory_mb: plan)


def _java() -> Toolchain | None:
    compiler = _which("javac")
    if compiler is None:
        return None
    home = compiler.resolve().parents[1]
    settings = {(home / file).resolve().parent for file in ("lib/jvm.cfg", "conf/net.properties")}  # or links into /etc
    paths = _outside_system(home, *(folder for folder in settings if not folder.is_relative_to(home)))
    options = ["-XX:+UseSerialGC", "-Xshare:auto", "-XX:ReservedCodeCacheSize=64m"]
    options.append(f"-XX:ActiveProcessorCount={_PROCESSORS}")
    compile_options = [f"-J{option}" for option in (*options, "-XX:TieredStopAtLevel=1", "-Xmx512m")]
    compile_options += ["-proc:none", "-encoding", "UTF-8", "-d", "."]

    def plan(source: str, memory_mb: int) -> Program:
        file, main = _java_names(source)
        run = [str(home / "bin/java"), *options, f"-Xmx{memory_mb}m", "-Xss64m", "-cp", ".", main]
        return Program(file, [str(home / "bin/javac"), *compile_options, file], run)

    # So much because each of the dozen threads of a virtual machine counts with its whole stack.
    return Toolchain("java", compiler, Runtime(paths), Runtime(paths, extra_mb=1024), plan)


def _java_names(source: str) -> tuple[str, str]:
    """The file that javac wants a source in, and the class to start: the public one, or the last before main."""
    package, public, main = (pattern.search(source) for pattern in (_JAVA_PACKAGE, _JAVA_PUBLIC, _JAVA_MAIN))
    classes = _JAVA_CLASS.findall(source, 0, main.start() if main else len(source))
    name = public[1] if public else classes[-1] if classes else "Main"
    return f"{name}.java", f"{package[1]}.{name}" if package else name


def _javascript() -> Toolchain | None:
    node = _node()
    if node is None:
        return None

    def plan(source: str, memory_mb: int) -> Program:
        file = f"main{_js_suffix(source)}"
        return Program(file, [str(node), "--check", file], [str(node), _heap(memory_mb), file], interpreted=True)

    return Toolchain("javascript", node, _node_runtime(node), _node_runtime(node), plan)


def _typescript() -> Toolchain | None:
    """Drops the types without checking them, through the compiler's module or else through node's own."""
    node, tsc = _node(), _which("tsc")
    if node is None:
        return None
    module = tsc.resolve().parents[1] / "lib/typescript.js" if tsc else None
    paths: tuple[Path, ...] = ()
    if module and module.exists():
        script, paths = _TRANSPILE.format(module=str(module)), _outside_system(module)
    elif _ask([str(node), "-p", "typeof require('module').stripTypeScriptTypes"]) == "function":
        script = _STRIP
    else:
        return None

    def plan(source: str, memory_mb: int) -> Program:
        file = f"main{_js_suffix(source)}"
        compiler = [str(node), "--no-warnings", "-e", script, "main.ts", file]
        return Program("main.ts", compiler, [str(node), _heap(memory_mb), file])

    runtime = _node_runtime(node)
    return Toolchain("typescript", node, replace(runtime, paths=runtime.paths + paths), runtime, plan)


def _node() -> Path | None:
    node = _which("node")
    return Path(_ask([str(node), "-p", "process.execPath"])).resolve() if node else None


def _node_runtime(node: Path) -> Runtime:
    """The one file that node mostly is, or else where its libraries lie too."""
    prefix = node.parents[1]
    libraries = _ask([str(node), "-p", "process.report.getReport().sharedObjects.join('\\n')"]).splitlines()
    alone = not any(Path("/", library).resolve().is_relative_to(prefix) for library in libraries)
    return replace(Runtime(_outside_system(node)) if alone else _prefix_runtime(prefix), extra_mb=320)


def _js_suffix(source: str) -> str:
    return ".mjs" if _JS_MODULE.search(source) else ".js"


def _heap(memory_mb: int) -> str:
    return f"--max-old-space-size={memory_mb}"


def _bash() -> Toolchain | None:
    executable = _which("bash")
    if executable is None:
        return None
    plan = Program("main.sh", [str(executable), "-n", "main.sh"], [str(executable), "main.sh"])
    return Toolchain("bash", executable, SYSTEM, Runtime(extra_mb=16), lambda _source, _memory_mb: plan)


def _which(command: str) -> Path | None:
    path = shutil.which(command)
    return Path(path) if path else None


def _ask(command: list[str]) -> str:
    """What a toolchain says of itself. Raises ValueError where it is broken."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"language: {command[0]} doesn't work: {error}; repair or reinstall it") from error
    return ran.stdout.strip()


def _prefix_runtime(prefix: Path) -> Runtime:
    """All that is installed below `prefix`, which may be a virtual environment, but for packages of Python."""
    paths = _outside_system(prefix)
    packages = {folder.resolve() for path in paths for folder in path.glob("lib*/python3*/*-packages")}
    return Runtime(paths, hidden=tuple(sorted(packages)))


def _outside_system(*paths: Path) -> tuple[Path, ...]:
    """Those that no box has anyway. Raises ValueError where judged programs would get to see the home of the user."""
    outside = tuple(path for path in paths if not path.is_relative_to("/usr"))
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111  Path's own raises for a user who has none
    for path in outside:
        if home.is_relative_to(path):
            raise ValueError(
                f"language: a toolchain lies in {path}, which holds your home, so that judged programs would read it; "
                "install the toolchain in a folder of its own"
            )
    return outside


LANGUAGES = {
    "python": Language(_python, "python3"),
    "c": Language(lambda: _gcc("c", "gcc", "gnu17"), "gcc"),
    "cpp": Language(lambda: _gcc("cpp", "g++", "gnu++20"), "g++"),
    "rust": Language(_rust, "rustc"),
    "go": Language(_go, "golang-go"),
    "java": Language(_java, "default-jdk-headless"),
    "javascript": Language(_javascript, "nodejs"),
    "typescript": Language(_typescript, "node-typescript"),
    "bash": Language(_bash, "bash"),
}
"""By the name that tasks use."""
