"""Small stages of every type, and the checkpoints they start from: for the tests of lineage."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from safetensors.numpy import save_file

from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.reward_model import RewardModelConfig
from configs.sft import SFTConfig
from configs.stages import AnyStage
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.run.lineage import check_lineage, write_lineage
from tests.settings import GRPO

SUMS = {"type": "sums", "size": 10}


def sft(model: Path, **changes: object) -> SFTConfig:
    settings = {
        "type": "sft",
        "model": {"path": str(model)},
        "data": {"source": SUMS},
        "conversations_per_step": 2,
        "steps": 4,
        "optimizer": {"learning_rate": 1e-3},
    }
    return SFTConfig.model_validate(settings | changes)


def grpo(model: Path, **changes: object) -> GRPOConfig:
    return GRPOConfig.model_validate(
        GRPO | {"model": {"path": str(model)}, "prompts_per_step": 2, "rollout": {"max_model_len": 32}} | changes
    )


def make_checkpoint(folder: Path, template: str | None = None, architecture: str = "LlamaForCausalLM") -> Path:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": [architecture]}))
    save_file({"weight": np.arange(3, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def start(folder: Path, stage: str, config: AnyStage) -> None:
    """A stage that has made its first step."""
    write_lineage(folder, stage, config, config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def check(folder: Path, config: AnyStage) -> None:
    check_lineage(folder, config, config)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def rm(model: Path, **changes: object) -> RewardModelConfig:
    settings = {
        "type": "rm",
        "model": {"path": str(model)},
        "data": {"source": SUMS},
        "loss": {"type": "pairwise"},
        "comparisons_per_step": 2,
        "steps": 2,
        "optimizer": {"learning_rate": 1e-3},
    }
    return RewardModelConfig.model_validate(settings | changes)


def gate(candidate: Path, parent: Path) -> GateConfig:
    return GateConfig.model_validate(
        {
            "type": "gate",
            "candidate": {"path": str(candidate)},
            "parent": {"path": str(parent)},
            "suites": {"sums": {"type": "task", "prompts": {"source": SUMS}, "reward": {"name": "math"}}},
            "rules": [{"type": "improve", "figure": "sums/pass@1_greedy"}],
            "sampling": {"max_tokens": 8},
            "rollout": {"max_model_len": 32},
        }
    )


def stage(run: Path, name: str, config: AnyStage, architecture: str = "LlamaForCausalLM") -> Path:
    """A stage of the run that was started and left a checkpoint, which is returned."""
    start(run / name, name, config)
    return make_checkpoint(run / name / "hf", architecture=architecture)


def pairs(folder: Path, answer: str = "2") -> Path:
    rows = [{"messages": [{"role": "user", "content": "1+1="}], "answers": [answer, "3"]}]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder)
    return folder
