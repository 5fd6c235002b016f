"""The notebooks of docs/notebooks run from top to bottom in a kernel, and are kept without outputs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import alignyard
from tests.test_architecture import HOME

NOTEBOOKS = sorted((HOME / "docs" / "notebooks").glob("*.ipynb"))
QUICK = "write_a_reward"
SMALL = {
    "align_a_small_model": "SFT_STEPS, GRPO_STEPS, PROBLEMS = 2, 2, 8",
    "compare_two_runs": "STEPS, SEEDS = 10, (0, 1)",
}
"""Sizes for tests, by notebook, in place of its cell with the tag `parameters`."""


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text())["cells"]


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook in `folder`; a cell that raises fails the test with its traceback."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    # The kernel is this Python, with this checkout, and looks for nothing in the user's home.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")]))
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(folder / "jupyter"))
    notebook = nbformat.read(HOME / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = SMALL[name]
    client = nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_three_and_their_sizes_are_known() -> None:
    assert {notebook.stem for notebook in NOTEBOOKS} == {QUICK, *SMALL}
    tagged = {
        book.stem for book in NOTEBOOKS for cell in cells(book) if "parameters" in cell["metadata"].get("tags", [])
    }
    assert tagged == {*SMALL}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_kept_without_outputs(notebook: Path) -> None:
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert code and not [cell for cell in code if cell["outputs"] or cell["execution_count"]]


WRITTEN = [
    (notebook.stem, *"".join(cell["source"]).split("\n", 1))
    for notebook in NOTEBOOKS
    for cell in cells(notebook)
    if "".join(cell["source"]).partition("\n")[0].endswith(".yaml")
]


@pytest.mark.parametrize(("notebook", "magic", "text"), WRITTEN, ids=[f"{name}-{magic}" for name, magic, _ in WRITTEN])
def test_configurations_in_notebooks_are_valid(notebook: str, magic: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / magic.removeprefix("%%writefile ")
    file.write_text(text)
    alignyard.load(file)


def test_the_quick_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(QUICK, tmp_path, monkeypatch)
    assert (tmp_path / "capital.py").is_file()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.ranks
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SMALL)
def test_notebooks_that_train_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(name, tmp_path, monkeypatch)
    assert list((tmp_path / "runs").iterdir())
