"""Every kind of stage on a simulated device, which has room for one owner at a time, and faults that it must show.

Memory that left the device is NaN here, and a ledger holds what each process has on it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.reward_model import RewardModelConfig
from configs.sampling import RolloutConfig, SamplingConfig, SyncConfig
from configs.sft import SFTConfig
from configs.train import CheckpointConfig, OptimizerConfig, TrainerConfig
from pipeline.cluster import start
from pipeline.cluster.room import quoted_interpreter, wait_for_resources
from pipeline.cluster.start import start_all, start_ranks, start_rollout
from pipeline.data.trees import Tree
from pipeline.errors import RunStopped
from pipeline.grpo.sync import probe_sequences, sync_weights
from pipeline.stages import evaluate, gate, grpo, reward_model, sft
from pipeline.stages.context import Context
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from pipeline.weights.export import export_state
from pipeline.weights.pieces import PieceReader
from rollout.device import SIMULATED, DeviceError, DeviceState
from rollout.engine import RolloutEngine
from rollout.pool import RolloutPool
from tests.pipeline.small_models import small_causal_lm
from tests.pipeline.test_reward_model_stage import config_of, write_pairs
from tests.series import series

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

BUDGET = 76 * 2**20
"""Bytes: an engine of the tiny model holds 7 MiB of weights and 64 of KV cache, a rank 36 MiB with its reference."""
SUMS = {"type": "sums", "size": 100}
ROLLOUT = {"max_model_len": 64, "kv_cache_gib": 0.0625, "max_num_seqs": 16, "threads": 1}
TRAINER = {"threads": 1}
TEXT = {"type": "text", "path": str(Path(__file__).with_name("small.yaml")), "window_tokens": 48}
TASK = {
    "type": "task",
    "prompts": {"source": SUMS | {"size": 4, "split": "held_out"}, "max_prompt_length": 16},
    "reward": {"name": "math"},
}


def config(kind: Any, type_: str, **settings: object) -> Any:
    return kind.model_validate({"type": type_} | settings)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the ledger, with a cluster whose processes see its device."""
    folder = tmp_path_factory.mktemp("ledger")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SIMULATED, f"{folder}:{BUDGET}")
        patch.setattr(start, "cluster", nullcontext)
        ray.init(num_gpus=2, num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
        yield folder / "device-0"
        ray.shutdown()


@pytest.fixture(scope="module")
def model(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of an SFT stage on the device."""
    folder = tmp_path_factory.mktemp("sft")
    settings = config(
        SFTConfig,
        "sft",
        model={"init_config": "tiny"},
        data={"source": SUMS, "max_length": 64},
        eval_data={"source": SUMS | {"size": 8, "split": "held_out"}, "max_length": 64},
        conversations_per_step=8,
        steps=2,
        optimizer={"learning_rate": 2e-3},
        trainer=TRAINER,
    )
    sft.launch(settings, folder, Context(folder / "evaluations"))
    return folder / "hf"


def held(device: Path) -> dict[str, set[str]]:
    """Kinds of memory that each owner ever held. No entry was above the budget."""
    kinds: dict[str, set[str]] = {}
    for line in (device / "entries.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["total"] <= BUDGET
        kinds.setdefault(entry["owner"], set()).update(kind for kind, size in entry["held"].items() if size)
    return kinds


def test_training_validation_and_gate_pass_with_room_for_one_owner(device: Path, model: Path, tmp_path: Path) -> None:
    """Engines start first and sleep, since the stage has its place on Ray's logical GPUs."""
    settings: dict[str, Any] = {"model": {"path": str(model)}, "rollout": ROLLOUT, "sampling": {"max_tokens": 8}}
    judge = GateConfig.model_validate(
        {
            "type": "gate",
            "candidate": {"path": str(tmp_path / "grpo" / "hf")},
            "parent": {"path": str(model)},
            "suites": {"text": TEXT, "sums": TASK},
            "rules": [{"type": "hold", "figure": "text/bits_per_byte", "tolerance": 9.0}],
            "rollout": ROLLOUT,
            "sampling": {"max_tokens": 8},
        }
    )
    training = config(
        GRPOConfig,
        "grpo",
        **settings,
        prompts={"source": SUMS, "max_prompt_length": 16},
        rewards=[{"name": "math"}],
        steps=2,
        prompts_per_step=4,
        group_size=4,
        updates_per_batch=2,
        overlong={"shaping_tokens": 6},
        optimizer={"learning_rate": 1e-3},
        trainer=TRAINER,
        checkpoint={"every_steps": 1, "keep": 2},
        validation={"gate": "judge.yaml", "every_steps": 1},
    )
    with start.cluster_when_needed(lambda: wait_for_resources(training, None, print)):
        last = grpo.launch(training, tmp_path / "grpo", Context(tmp_path / "evaluations", judge))
    results = {
        name: evaluate.run(judge, checkpoint, Path(checkpoint.path or ""), tmp_path / name)
        for name, checkpoint in (("candidate", judge.candidate), ("parent", judge.parent))
    }
    decision = gate.run(judge, results["candidate"], results["parent"], None, dict.fromkeys(results, ""), {}, None)
    assert decision.action == "promote"
    kinds = held(device)
    assert kinds["rank 0"] - {"gradients"} == {"weights", "optimizer", "reference", "logits", "sync"}
    assert kinds["rollout engine 0"] == {"weights", "KV cache", "logits", "sync"}
    # The gate's engine read `hf/`, the stage's engines got the trainer's weights.
    assert results["candidate"]["text"].figures["bits_per_byte"] == pytest.approx(
        last["validation/text/bits_per_byte"], abs=1e-6
    )
    moves = {
        f"device/{owner}_{state}_{unit}"
        for owner in ("ranks", "engines")
        for state in DeviceState
        for unit in ("seconds", "gib")
    }
    assert moves <= last.keys() and all(last[name] > 0 for name in moves if name.endswith("gib"))
    best = json.loads((tmp_path / "grpo" / "best" / "best.json").read_text())["step"]
    for step, folder in ((2, tmp_path / "grpo" / "hf"), (best, tmp_path / "grpo" / "best" / "hf")):
        AutoModelForCausalLM.from_pretrained(folder)
        assert_same(folder, tmp_path / "grpo" / "checkpoints" / f"step-{step}")
    assert_exported(tmp_path / "grpo", model)


def assert_exported(stage: Path, model: Path) -> None:
    """The export of the last training state holds what the ranks wrote as `hf/`."""
    lineage = {"models": {"model": {"folder": str(model)}}, "config": {"model": {}}}
    (stage / "lineage.json").write_text(json.dumps(lineage))
    again = export_state(stage / "checkpoints" / "step-2", stage / "again")
    exported, written = (load_file(folder / "model.safetensors") for folder in (again, stage / "hf"))
    assert exported.keys() == written.keys() and all(torch.equal(exported[name], x) for name, x in written.items())


def assert_same(exported: Path, state: Path) -> None:
    """Every weight that has the same name in both is that of the trainer's master weights."""
    weights = {name: x for file in exported.glob("*.safetensors") for name, x in load_file(file).items()}
    masters = PieceReader(state)
    names = weights.keys() & {name.removeprefix("causal_lm.") for name in masters.shapes}
    names = [name for name in names if not name.endswith("bias")]
    assert len(names) > 20
    assert all(torch.equal(weights[name], masters.whole("weight", f"causal_lm.{name}")) for name in names)


def test_a_reward_model_stage_passes(device: Path, tmp_path: Path) -> None:
    small_causal_lm("llama", tmp_path / "lm")
    write_pairs(tmp_path / "train.jsonl", 40, seed=0)
    write_pairs(tmp_path / "held_out.jsonl", 6, seed=1)
    settings = config_of(tmp_path, steps=2, trainer=TRAINER)
    reward_model.launch(RewardModelConfig.model_validate(settings), tmp_path / "rm", Context(tmp_path))
    assert len(series(tmp_path / "rm" / "metrics.jsonl")) == 2 and held(device)


@pytest.fixture(scope="module")
def pair(device: Path, model: Path) -> Iterator[tuple[TrainingRanks, RolloutPool]]:
    """A rank that is asleep, and an engine that is awake, in sync."""
    spec = TrainSpec(
        model, "float32", TrainerConfig(threads=1), OptimizerConfig(learning_rate=1e-3), 9, with_reference=True
    )
    config = RolloutConfig.model_validate(ROLLOUT)
    with start_all(lambda: start_ranks(spec)) as (policy,):
        policy.to(DeviceState.ASLEEP)
        with start_all(lambda: start_rollout(model, config, dtype="float32", seed=0)) as (rollout,):
            rollout.to(DeviceState.ASLEEP)
            sync(policy, rollout)
            yield policy, rollout


def sync(policy: TrainingRanks, rollout: RolloutPool) -> None:
    sync_weights(policy, rollout, SyncConfig(), probe=probe_sequences(264, max_model_len=64), version=1)


def test_a_missing_wake_is_named(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    policy, rollout = pair
    batch = policy.shard([Tree([1, 5, 6], root_mask=[0, 1, 1])])
    with pytest.raises(RunStopped, match="rank 0 is in state 'asleep', and 'reference_logprobs' needs 'awake'"):
        policy.add_logprobs(batch, reference=True)
    with pytest.raises(RunStopped, match="rank 0 is in state 'asleep', and 'forward_backward' needs 'awake'"):
        policy.update(batch, 2.0)
    rollout.to(DeviceState.ASLEEP)
    with pytest.raises(DeviceError, match="rollout engine 0 is in state 'asleep', and 'advance' needs 'awake'"):
        list(rollout.generate([[1, 5]], SamplingConfig(max_tokens=4), 1, seed=0))
    sync(policy, rollout)


def test_a_save_while_asleep_is_named_and_leaves_no_checkpoint(
    pair: tuple[TrainingRanks, RolloutPool], tmp_path: Path
) -> None:
    for last_step, method in ((3, "save_hf"), (6, "begin_save")):
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(every_steps=3), pair[0], last_step=last_step)
        with pytest.raises(RunStopped, match=f"rank 0 is in state 'asleep', and '{method}' needs"):
            checkpoints.write(3)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_tensor_that_a_sync_forgets_is_named(pair: tuple[TrainingRanks, RolloutPool], name: str) -> None:
    """The check of the names is passed: the tensor arrives, and is not loaded."""
    policy, rollout = pair
    rollout.to(DeviceState.ASLEEP)
    on_engine(rollout, partial(forget, name=name))
    with pytest.raises(DeviceError, match=rf"rollout engine 0 lost 1 tensors .*\['{name}'\]"):
        sync(policy, rollout)
    on_engine(rollout, remember)
    rollout.to(DeviceState.ASLEEP)
    sync(policy, rollout)


def on_engine(rollout: RolloutPool, change: Any) -> None:
    ray.get([engine.__ray_call__.remote(change) for engine in rollout._engines], timeout=60)


def forget(actor: Any, *, name: str) -> None:
    """Let vLLM's worker ignore a tensor that arrived."""

    def ignore(worker: Any) -> None:
        model = worker.get_model()
        load = model.load_weights
        model.load_weights = lambda tensors: load([tensor for tensor in tensors if tensor[0] != name])

    actor._engine._llm.collective_rpc(ignore)


def remember(actor: Any) -> None:
    actor._engine._llm.collective_rpc(lambda worker: delattr(worker.get_model(), "load_weights"))


def test_a_rank_has_what_deterministic_products_of_cublas_need(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    [rank] = pair[0]._ranks
    variable = rank.__ray_call__.remote(lambda _: os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    assert ray.get(variable, timeout=60) == ":4096:8"


def test_two_owners_above_the_budget_are_named_with_what_they_hold(pair: tuple[TrainingRanks, RolloutPool]) -> None:
    with pytest.raises(RunStopped) as caught:
        pair[0].to(DeviceState.AWAKE)
    assert "device-0 of 76.0 MiB" in str(caught.value)
    assert "rank 0 holds" in str(caught.value) and "MiB of reference" in str(caught.value)
    assert "rollout engine 0 holds" in str(caught.value) and "63.8 MiB of KV cache" in str(caught.value)


@pytest.mark.parametrize("engine", [TrainEngine, RolloutEngine])
def test_every_method_names_the_states_it_needs(engine: type) -> None:
    methods = {name: method for name, method in vars(engine).items() if callable(method) and not name.startswith("_")}
    assert len(methods) > 5
    assert [name for name, method in methods.items() if not getattr(method, "needed_states", ())] == []
