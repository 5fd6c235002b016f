import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.import_guard import GUARDED_PACKAGES, INSTALL_FOLDER, check_imports

RECIPE = str(Path(__file__).parents[1] / "configs" / "recipe.yaml")


def alignyard(folder: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`config` on the fixture, from `folder`, with `path` as PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [*command, "config", RECIPE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


MODULE = (sys.executable, "-m", "jobs.cli")
SCRIPT = (str(Path(sys.executable).parent / "alignyard"),)


@pytest.mark.parametrize("package", GUARDED_PACKAGES)
@pytest.mark.parametrize("init", [True, False], ids=["with __init__", "bare folder"])
def test_a_folder_in_the_working_directory_is_named(tmp_path: Path, package: str, init: bool) -> None:
    (tmp_path / package).mkdir()
    if init:
        (tmp_path / package / "__init__.py").touch()
    result = alignyard(tmp_path, *MODULE)
    assert result.returncode == 2
    assert (
        result.stderr.startswith(f"alignyard: {tmp_path / package} is in the way") and "Traceback" not in result.stderr
    )


def test_a_folder_on_pythonpath_is_named_for_the_script_too(tmp_path: Path) -> None:
    (tmp_path / "mine" / "rewards").mkdir(parents=True)
    (tmp_path / "mine" / "rewards" / "__init__.py").touch()
    result = alignyard(tmp_path, *SCRIPT, path=tmp_path / "mine")
    assert result.returncode == 2 and f"{tmp_path / 'mine' / 'rewards'} is in the way" in result.stderr


def test_a_module_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "configs.py").touch()
    result = alignyard(tmp_path, *MODULE)
    assert result.returncode == 2 and f"{tmp_path / 'configs.py'} is in the way" in result.stderr


def test_a_folder_that_is_not_on_the_path_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    result = alignyard(tmp_path, *SCRIPT)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("name: fixture")


def test_the_installed_packages_pass() -> None:
    check_imports()
    assert all((INSTALL_FOLDER / package).is_dir() for package in GUARDED_PACKAGES)


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.13.0"])
def test_packages_built_for_cuda_are_named_beside_a_torch_for_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str
) -> None:
    """`transformers` would fail in its import of torchvision, with a traceback about an operator."""
    for package, build in (("torchvision", "+cu130"), ("torchaudio", "+cpu")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "version.py").write_text(f"__version__ = '0.28.0{build}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("jobs.import_guard.version", lambda _: torch)
    if torch.endswith("+cpu"):
        with pytest.raises(ValueError, match=r"torchvision: built for CUDA.*pip uninstall torchvision$"):
            check_imports()
    else:
        check_imports()
