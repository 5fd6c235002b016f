"""`alignyard doctor`: this machine, the installed packages and programs, and the effect of each missing one."""

import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from rich.console import Console

from jobs.command import OUT, plain_table, verb_app
from jobs.import_guard import IS_CHECKOUT, set_up_command
from jobs.machine import Finding, machine
from rewards.sandbox.box import Sandbox
from rewards.sandbox.toolchains import LANGUAGES

app = verb_app()
PURPOSE_OF_EXTRA = {
    "": "everything",
    "cpu": "rollouts and training on the CPU",
    "gpu": "rollouts and training on GPUs",
    "gguf": "alignyard import-gguf",
    "lm-eval": "suites of lm-eval",
    "dev": "make test",
}
REQUIRED_EXTRAS = ("", "cpu", "gpu")


@app.command()
def doctor() -> int:
    """List devices, driver, cores, memory, disk, packages and programs; for each that is missing or too old, the work
    that needs it and the remedy.

    Ends with 1 if something required is missing.

    \b
    Example:
      alignyard doctor
    """
    return report(OUT)


def report(console: Console) -> int:
    """Prints all findings; returns 1 if something required is missing, or else 0."""
    findings = [*machine(), *packages(), *compiler(), *languages()]
    table = plain_table("", "found", "missing for")
    for finding in findings:
        colour = "" if not finding.missing else "red" if finding.required else "yellow"
        table.add_row(finding.subject, finding.state, finding.purpose if finding.missing else "", style=colour)
    console.print(table)
    lacking = [finding.subject for finding in findings if finding.missing and finding.required]
    if lacking:
        console.print(f"missing: {', '.join(lacking)}; packages: {set_up_command()}", style="red", soft_wrap=True)
    return 1 if lacking else 0


def packages() -> Iterator[Finding]:
    """Every package that alignyard requires on this kind of machine, compared with the version it pins."""
    extras = ("", "gpu" if _installed_version("vllm") else "cpu", "gguf", "dev" if IS_CHECKOUT else "lm-eval")
    for requirement in map(Requirement, requires("alignyard") or []):
        marker = requirement.marker
        extra = next((extra for extra in extras if marker is None or marker.evaluate({"extra": extra})), None)
        if extra is None:
            continue
        installed = _installed_version(requirement.name)
        wrong = installed is None or not requirement.specifier.contains(installed, prereleases=True)
        yield Finding(
            requirement.name,
            f"{installed or 'none'}, not {requirement.specifier or 'any'}" if wrong else str(installed),
            purpose=PURPOSE_OF_EXTRA[extra],
            missing=wrong,
            required=extra in REQUIRED_EXTRAS,
        )


def compiler() -> Iterator[Finding]:
    """The compiler that DeepSpeed calls."""
    path = shutil.which("g++")
    purpose = "DeepSpeed, which compiles an operator at its first start"
    yield Finding("g++", path or "not found", purpose, missing=path is None, required=True)


def languages() -> Iterator[Finding]:
    """The sandbox for judged programs, and the languages that they may be written in."""
    try:
        limiter = "control group" if Sandbox().has_groups else "looking every 20 ms"
        yield Finding("sandbox", f"bubblewrap works, memory by {limiter}")
    except ValueError as error:
        yield Finding("sandbox", "does not work", f"judging programs: {error}", missing=True)
    for name, language in LANGUAGES.items():
        purpose = f"judging programs in it (Debian: {language.package})"
        try:
            toolchain = language.locate()
        except ValueError as error:
            yield Finding(f"language {name}", "does not work", f"{purpose}: {error}", missing=True)
        else:
            state = str(toolchain.executable) if toolchain else "not found"
            yield Finding(f"language {name}", state, purpose, missing=toolchain is None)


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
