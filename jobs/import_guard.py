"""Checks that Python imports alignyard's own packages, not folders of the same name, and packages that go together.

The packages have everyday names (`configs`, `rewards`, ...). Python imports the first folder of that name on its path,
so a user's `rewards/` in the working directory or on PYTHONPATH would silently replace ours.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

GUARDED_PACKAGES = ("jobs", "configs", "rewards", "rollout", "pipeline")
INSTALL_FOLDER = Path(__file__).resolve().parent.parent
IS_CHECKOUT = (INSTALL_FOLDER / "setup.sh").is_file()
"""False where alignyard was installed from a wheel."""
COMPILED_FOR_TORCH = ("torchvision", "torchaudio")
"""Packages that `transformers` imports where they are installed. Nothing here uses them."""


def set_up_command(extra: str = "cpu") -> str:
    """The command that installs alignyard and all it needs."""
    if IS_CHECKOUT:
        return "make setup" + (f" EXTRA={extra}" if extra != "cpu" else "")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu " if extra == "cpu" else ""
    return f"pip install {index}'alignyard[{extra}]'"


def check_imports() -> None:
    """Raises ValueError naming the other folder or file, if a package would not be imported from here, and naming the
    packages that were compiled for another torch than the installed one."""
    for package in GUARDED_PACKAGES:
        spec = find_spec(package)
        if spec is None:
            raise ValueError(f"alignyard's own '{package}' is not in {INSTALL_FOLDER}; run {set_up_command()} again")
        location = next(iter(spec.submodule_search_locations or ()), spec.origin)
        path = Path(str(location)).resolve()
        if path != INSTALL_FOLDER / package:
            raise ValueError(
                f"{path} is in the way: Python imports it in place of alignyard's own '{package}' "
                f"({INSTALL_FOLDER / package}). Rename it, start alignyard from another folder, or remove its parent "
                "from PYTHONPATH"
            )
    if cuda_builds := [package for package in COMPILED_FOR_TORCH if _needs_cuda(package)]:
        names = " and ".join(cuda_builds)
        raise ValueError(
            f"{names}: built for CUDA, while torch is built for the CPU, so that transformers can't be imported. "
            f"Nothing here needs them: pip uninstall {' '.join(cuda_builds)}"
        )


def _needs_cuda(package: str) -> bool:
    """True for a package that was compiled for CUDA beside a torch that was not."""
    try:
        if "+cpu" not in version("torch"):
            return False
    except PackageNotFoundError:
        return False
    spec = find_spec(package)
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return bool(file and file.is_file() and re.search(r"\+cu\d", file.read_text(encoding="utf-8")))
