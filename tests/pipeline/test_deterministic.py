"""The setting trainer.deterministic: on for CPUs, off for CUDA, and what cuBLAS needs is there before CUDA starts."""

import os
from collections.abc import Iterator

import pytest
import torch

from configs.train import TrainerConfig
from pipeline.train.build import prepare_torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def unprepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nothing is set, and torch as it was afterwards."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv(WORKSPACE, "")  # so that it is restored
    monkeypatch.delenv(WORKSPACE)
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(
    ("setting", "on_cuda", "deterministic"),
    [("auto", False, True), ("auto", True, False), (True, True, True), (False, True, False), (False, False, False)],
)
def test_determinism_follows_the_setting_and_the_device(
    monkeypatch: pytest.MonkeyPatch, setting: object, on_cuda: bool, deterministic: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    trainer = TrainerConfig.model_validate({"deterministic": setting})
    assert prepare_torch(trainer.deterministic).type == ("cuda" if on_cuda else "cpu")
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    # torch.use_deterministic_algorithms makes every product of cuBLAS raise without it
    assert os.environ.get(WORKSPACE) == (":4096:8" if deterministic else None)


def test_a_value_of_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    prepare_torch(True)
    assert os.environ[WORKSPACE] == ":16:8"


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="deterministic"):
        TrainerConfig.model_validate({"deterministic": "maybe"})
