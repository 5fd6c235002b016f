"""Checks that Python imports alignyard's own packages, not folders of the same name.

The packages have everyday names (`configs`, `rewards`, ...). Python imports the first folder of that name on its path,
so a user's `rewards/` in the working directory or on PYTHONPATH would silently replace ours.
"""

from importlib.util import find_spec
from pathlib import Path

GUARDED_PACKAGES = ("configs", "rewards", "rollout", "pipeline")
INSTALL_FOLDER = Path(__file__).resolve().parent.parent


def check_imports() -> None:
    """Raises ValueError naming the other folder or file, if a package would not be imported from beside `jobs`."""
    for package in GUARDED_PACKAGES:
        spec = find_spec(package)
        if spec is None:
            raise ValueError(f"alignyard's own '{package}' is not installed in {INSTALL_FOLDER}; run make setup again")
        location = next(iter(spec.submodule_search_locations or ()), spec.origin)
        path = Path(str(location)).resolve()
        if path != INSTALL_FOLDER / package:
            raise ValueError(
                f"{path} is in the way: Python imports it in place of alignyard's own '{package}' "
                f"({INSTALL_FOLDER / package}). Rename it, start alignyard from another folder, or remove its parent "
                "from PYTHONPATH"
            )
