"""Ranks that leave their devices and come back, on simulated devices, where their memory is really gone meanwhile."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.weights.fresh import create_model
from tests.pipeline import sleep_ranks
from tests.pipeline.rank_processes import run_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("size", [1, 2])
def test_weights_are_right_in_every_state_and_training_does_not_notice(tmp_path: Path, size: int) -> None:
    """The ranks assert what each state holds. Here: the exported model, and the updates after a sleep."""
    model = create_model("tiny", 0, tmp_path / "tiny")
    run_ranks(sleep_ranks.main, 2, tmp_path, model, tmp_path, size)
    for stage, dtype in sleep_ranks.CASES[size]:
        folder = tmp_path / f"{stage}-{dtype}"
        exported, awake, norms = sleep_ranks.saved(folder)
        assert exported.keys() == awake.keys() and len(awake) > 40
        assert all(torch.equal(exported[name], awake[name]) for name in awake)
        assert norms["asleep"] == norms["awake"]
        loaded = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="auto")
        assert loaded.dtype == getattr(torch, dtype)
        assert torch.equal(loaded.get_output_embeddings().weight, awake["lm_head.weight"])
