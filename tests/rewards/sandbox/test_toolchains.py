"""Every language of this machine compiles and runs in a box; for a missing one the error names its package."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.sandbox import toolchains
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import ExitReason, Limits, RunResult
from rewards.sandbox.toolchains import COMPILE, LANGUAGES, find_toolchain, plan_program
from tests.rewards.sandbox.programs import available_languages

LIMITS = Limits(seconds=10)
HELLO = {
    "python": "print('hello', int(input()) + 1)",
    "c": '#include <stdio.h>\nint main(void) { int n; scanf("%d", &n); printf("hello %d\\n", n + 1); }',
    "cpp": '#include <iostream>\nint main() { int n; std::cin >> n; std::cout << "hello " << n + 1 << "\\n"; }',
    "rust": "use std::io;\nfn main() { let mut s = String::new(); io::stdin().read_line(&mut s).unwrap();"
    ' println!("hello {}", s.trim().parse::<i32>().unwrap() + 1); }',
    "go": 'package main\nimport "fmt"\nfunc main() { var n int; fmt.Scan(&n); fmt.Println("hello", n+1) }',
    "java": "import java.util.Scanner;\npublic class Main { public static void main(String[] args) {"
    ' System.out.println("hello " + (new Scanner(System.in).nextInt() + 1)); } }',
    "javascript": "console.log('hello', +require('fs').readFileSync('/dev/stdin', 'utf8') + 1)",
    "typescript": "import * as fs from 'fs';\nenum Step { One = 1 }\n"
    "const n: number = +fs.readFileSync(0, 'utf8');\nconsole.log('hello', n + Step.One);",
    "bash": "read -r n; echo hello $((n + 1))",
}
EATS_MEMORY = {
    "python": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "c": "#include <stdlib.h>\n#include <string.h>\nint main(void) { for (;;) memset(malloc(1 << 20), 1, 1 << 20); }",
    "cpp": "#include <vector>\nint main() { std::vector<int> held; for (;;) held.push_back(1); }",
    "rust": "fn main() { let mut held: Vec<u64> = vec![]; loop { held.push(held.len() as u64) } }",
    "go": "package main\nfunc main() { held := []int{}; for { held = append(held, 1) } }",
    "java": "public class Main { public static void main(String[] args) {"
    " var held = new java.util.ArrayList<byte[]>(); while (true) held.add(new byte[1 << 20]); } }",
    "javascript": "const held = []; for (;;) held.push(new Array(1 << 16).fill(1.5));",
    "typescript": "const held: number[][] = []; for (;;) held.push(new Array(1 << 16).fill(1.5));",
    "bash": "held=x; while :; do held=$held$held; done",
}
BROKEN = {"bash": "if true; then", "python": "print('"}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    find_toolchain.cache_clear()


def has(language: str) -> None:
    """Skips where a toolchain is missing, which is what a machine may lack and not what a test may find broken."""
    if LANGUAGES[language].locate() is None:
        pytest.skip(f"no toolchain for {language} here")


def run(
    sandbox: Sandbox, folder: Path, language: str, source: str, stdin: bytes = b"41\n"
) -> tuple[RunResult, RunResult | None]:
    """Compile `source` and, if that succeeds, run it."""
    toolchain = find_toolchain(language)
    program = plan_program(language, source, LIMITS.memory_mb)
    (folder / program.file).write_text(source)
    compilation = sandbox.run(
        program.compile, folder=folder, limits=COMPILE, runtime=toolchain.compiling, writable=True
    )
    if compilation.exit_code != 0:
        return compilation, None
    return compilation, sandbox.run(program.run, folder=folder, limits=LIMITS, runtime=toolchain.running, stdin=stdin)


@pytest.mark.parametrize("language", LANGUAGES)
def test_hello(sandbox: Sandbox, tmp_path: Path, language: str) -> None:
    has(language)
    compilation, result = run(sandbox, tmp_path, language, HELLO[language])
    assert result, compilation
    assert (result.reason, result.exit_code, result.stdout) == (ExitReason.EXITED, 0, b"hello 42\n"), result


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_no_program_does_not_compile(sandbox: Sandbox, tmp_path: Path, language: str) -> None:
    has(language)
    compilation, result = run(sandbox, tmp_path, language, BROKEN.get(language, "int main( {"))
    assert result is None
    assert compilation.reason is ExitReason.EXITED and compilation.stderr


@pytest.mark.parametrize("language", LANGUAGES)
def test_memory_runs_out(sandbox: Sandbox, tmp_path: Path, language: str) -> None:
    has(language)
    _, result = run(sandbox, tmp_path, language, EATS_MEMORY[language])
    assert result and result.reason is ExitReason.MEMORY, result


def test_a_compiler_is_held_to_its_limits(sandbox: Sandbox, tmp_path: Path) -> None:
    has("c")
    source = "int held[1 << 28] = {1};\nint main(void) { return 0; }"  # a file of 1 GiB
    compilation, _ = run(sandbox, tmp_path, "c", source)
    assert compilation.exit_code != 0
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= COMPILE.disk_mb << 20


def test_a_compiler_reads_nothing_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    has("c")
    compilation, _ = run(sandbox, tmp_path, "c", '#include "/etc/passwd"\nint main(void) {}')
    assert compilation.exit_code == 1 and b"No such file" in compilation.stderr


def test_python_has_the_standard_library_only(sandbox: Sandbox, tmp_path: Path) -> None:
    source = "import decimal, sqlite3, sys\nexit_code = 7\ntry: import pip\nexcept ImportError: exit(exit_code)"
    _, result = run(sandbox, tmp_path, "python", source)
    assert result and result.exit_code == 7


@pytest.mark.parametrize(
    ("source", "file", "starts"),
    [
        ("public class Main {}", "Main.java", "Main"),
        ("import x.Y;\nclass A {}\npublic final class Deep {\n  static class Node {}\n", "Deep.java", "Deep"),
        ("class A {}\nclass B { public static void main(String[] a) {} }\nclass C {}", "B.java", "B"),
        ("package a.b;\npublic class Main {}", "Main.java", "a.b.Main"),
        ("no class at all", "Main.java", "Main"),
    ],
)
def test_java_names(source: str, file: str, starts: str) -> None:
    assert toolchains._java_names(source) == {"file": file, "main": starts}


def test_java_starts_the_class_with_main(sandbox: Sandbox, tmp_path: Path) -> None:
    has("java")
    source = (
        "package a;\nclass Node {}\nclass Other { public static void main(String[] args) { System.out.print(6); } }"
    )
    _, result = run(sandbox, tmp_path, "java", source)
    assert result and result.stdout == b"6", result


@pytest.mark.parametrize(
    "source", ["import fs from 'fs';\nconsole.log(typeof fs)", "console.log(typeof require('fs'))"]
)
def test_javascript_in_both_forms(sandbox: Sandbox, tmp_path: Path, source: str) -> None:
    has("javascript")
    _, result = run(sandbox, tmp_path, "javascript", source)
    assert result and result.stdout == b"object\n", result


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "python"])
def test_a_missing_toolchain_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, language: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    find_toolchain.cache_clear()
    assert available_languages() == ["python"]
    with pytest.raises(ValueError, match=f"'{language}'; install {LANGUAGES[language].package}".replace("+", r"\+")):
        find_toolchain(language)


def test_an_unknown_language_is_told() -> None:
    with pytest.raises(ValueError, match=r"'c\+\+' .*did you mean"):
        find_toolchain("c++")


def test_a_toolchain_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _tool(tmp_path / "go", "#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert available_languages() == ["python"]
    with pytest.raises(ValueError, match=r"language: .*/go .*status 3.*reinstall"):
        find_toolchain("go")


def test_of_a_toolchain_s_prefix_a_program_sees_no_packages(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages = tmp_path / "prefix/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    (packages / "secret.py").touch()
    (tmp_path / "prefix/lib64").symlink_to("lib")
    _tool(tmp_path / "prefix/bin/gcc", "#!/bin/sh\n")
    for folder in (tmp_path / "prefix", *(tmp_path / "prefix").rglob("*/")):
        folder.chmod(0o755)  # as an installer leaves it, whatever the umask here
    monkeypatch.setenv("PATH", str(tmp_path / "prefix/bin"))
    look = ["/usr/bin/find", str(tmp_path), "-name", "gcc", "-o", "-name", "secret.py"]
    result = sandbox.run(look, folder=tmp_path, limits=LIMITS, runtime=find_toolchain("c").running)
    assert result.stdout.decode().split() == [str(tmp_path / "prefix/bin/gcc")], result


def test_node_alone_is_all_that_a_program_sees_of_where_it_lies(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even of a home, in whose bin it may lie."""
    has("javascript")
    home, folder = tmp_path / "home", tmp_path / "folder"
    folder.mkdir()
    (home / "bin").mkdir(parents=True)
    (home / "secret").touch()
    shutil.copy(find_toolchain("javascript").executable, home / "bin/node")
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.setenv("HOME", str(home))
    find_toolchain.cache_clear()
    source = f"console.log(require('fs').readdirSync({str(home)!r}, {{ recursive: true }}))"
    _, result = run(sandbox, folder, "javascript", source)
    assert result and result.stdout == b"[ 'bin', 'bin/node' ]\n", result


def test_no_program_sees_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _tool(tmp_path / "user/bin/gcc", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "user/bin"))
    for home in ("user", "user/home"):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        with pytest.raises(ValueError, match=rf"language: .*{re.escape(str(tmp_path / 'user'))}.*home"):
            find_toolchain("c")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_toolchain("c").running.paths == (tmp_path / "user",)


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("go", 'package main\nimport ("fmt"; "runtime")\nfunc main() { fmt.Println(runtime.GOMAXPROCS(0)) }'),
        (
            "java",
            "public class Main { public static void main(String[] args) {"
            " System.out.println(Runtime.getRuntime().availableProcessors()); } }",
        ),
    ],
)
def test_threads_do_not_grow_with_the_machine(sandbox: Sandbox, tmp_path: Path, language: str, source: str) -> None:
    has(language)
    compilation, result = run(sandbox, tmp_path, language, source)
    assert result and result.stdout == b"4\n", result or compilation


def _tool(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
