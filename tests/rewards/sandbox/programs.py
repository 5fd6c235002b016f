"""Programs for the sandbox's tests to run."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Limits, RunResult
from rewards.sandbox.toolchains import LANGUAGES, find_toolchain, plan_program

LIMITS = Limits(seconds=10, memory_mb=128, output_kb=64, disk_mb=8, processes=32)
"""Long enough for a busy machine where time isn't what a test is about."""
SHORT = replace(LIMITS, seconds=0.3)


def bash(sandbox: Sandbox, folder: Path, source: str, limits: Limits = LIMITS, stdin: bytes = b"") -> RunResult:
    return sandbox.run(["/bin/bash", "-c", source], folder=folder, limits=limits, stdin=stdin)


def python(sandbox: Sandbox, folder: Path, source: str, limits: Limits = LIMITS) -> RunResult:
    program = plan_program("python", source, limits.memory_mb)
    (folder / program.file).write_text(source)
    return sandbox.run(program.run, folder=folder, limits=limits, runtime=find_toolchain("python").running)


def available_languages() -> list[str]:
    """Return the languages whose toolchains are installed and usable."""
    languages: list[str] = []
    for language, row in LANGUAGES.items():
        with suppress(ValueError):
            languages += [language] if row.locate() else []
    return languages
