"""What this machine has, and what is missing for what: `alignyard doctor`."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from rewards.sandbox.box import Sandbox
from rewards.sandbox.toolchains import LANGUAGES

GIB = 2**30
PURPOSES = {
    "": "everything",
    "cpu": "rollouts and training on the CPU",
    "gpu": "rollouts and training on GPUs",
    "gguf": "alignyard import-gguf",
    "dev": "make test",
}
REQUIRED_EXTRAS = ("", "cpu", "gpu")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    `missing` also means of the wrong version, `purpose` is what then cannot be done, `required` that nothing can.
    """

    subject: str
    found: str
    purpose: str = ""
    missing: bool = False
    required: bool = False


def doctor(console: Console) -> int:
    """Prints the findings; 1 if something required is missing, else 0."""
    findings = [*machine(), *packages(), *compiler(), *sandbox()]
    table = Table("", "found", "missing for", box=None, header_style="bold")
    for finding in findings:
        colour = "" if not finding.missing else "red" if finding.required else "yellow"
        table.add_row(finding.subject, finding.found, finding.purpose if finding.missing else "", style=colour)
    console.print(table)
    lacking = [finding.subject for finding in findings if finding.missing and finding.required]
    if lacking:
        console.print(f"missing: {', '.join(lacking)}; make setup installs the Python packages", style="red")
    return 1 if lacking else 0


def machine() -> Iterator[Finding]:
    """Devices, cores, memory and disk."""
    import torch  # seconds, which --help does not spend

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    if not torch.cuda.is_available():
        yield Finding("GPU", "none: everything runs on the CPU")
    memory, shared, disk = psutil.virtual_memory(), shutil.disk_usage("/dev/shm"), shutil.disk_usage(".")
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding(
        "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    yield Finding("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    yield Finding("/dev/shm", f"{shared.free / GIB:.1f} of {shared.total / GIB:.1f} GiB free")
    yield Finding("disk", f"{disk.free / GIB:.0f} of {disk.total / GIB:.0f} GiB free here")


def packages() -> Iterator[Finding]:
    """Every package alignyard asks for on this kind of machine, and whether it has the version that is pinned."""
    extras = ("", "gpu" if _installed("vllm") else "cpu", "gguf", "dev")
    for requirement in map(Requirement, requires("alignyard") or []):
        marker = requirement.marker
        extra = next((extra for extra in extras if marker is None or marker.evaluate({"extra": extra})), None)
        if extra is None:
            continue
        found = _installed(requirement.name)
        wrong = found is None or not requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            requirement.name,
            f"{found or 'none'}, not {requirement.specifier or 'any'}" if wrong else str(found),
            purpose=PURPOSES[extra],
            missing=wrong,
            required=extra in REQUIRED_EXTRAS,
        )
    torch, torchvision = _installed("torch"), _installed("torchvision")
    if torch and torchvision and "+cpu" in torch and "+cpu" not in torchvision:
        remedy = "import transformers, which this CUDA build breaks: pip uninstall torchvision"
        yield Finding("torchvision", torchvision, remedy, missing=True, required=True)


def compiler() -> Iterator[Finding]:
    """What DeepSpeed compiles with."""
    where = shutil.which("g++")
    purpose = "DeepSpeed, which compiles an operator at its first start"
    yield Finding("g++", where or "not found", purpose, missing=where is None, required=True)


def sandbox() -> Iterator[Finding]:
    """Whether judged programs can be kept in a sandbox, and in which languages they can be."""
    try:
        minded = "control group" if Sandbox().has_groups else "looking every 20 ms"
        yield Finding("sandbox", f"bubblewrap works, memory by {minded}")
    except ValueError as error:
        yield Finding("sandbox", "does not work", f"judging programs: {error}", missing=True)
    for name, language in LANGUAGES.items():
        purpose = f"judging programs in it (Debian: {language.package})"
        try:
            toolchain = language.locate()
        except ValueError as error:
            yield Finding(f"language {name}", "does not work", f"{purpose}: {error}", missing=True)
            continue
        found = str(toolchain.executable) if toolchain else "not found"
        yield Finding(f"language {name}", found, purpose, missing=toolchain is None)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
