"""Checks of one training rank: a TrainEngine on the device, with torch, transformers and deepspeed alone."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from configs.sft import MtpConfig
from configs.train import OffloadConfig, OptimizerConfig, TrainerConfig
from pipeline.data.trees import MicroBatch, Tree
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.train.engine import TrainEngine
from pipeline.train.spec import TrainSpec
from rollout.device import DeviceState
from tests.gpu.check import Skip
from tests.gpu.kernels import GIB, ON_GPU
from tests.pipeline.sharding import shard

IDS = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ZERO_STAGES = (0, 1, 2, 3)


def model(folder: Path, family: str = "qwen3", **sizes: Any) -> Path:
    """Write a random model, of 130 million parameters on a GPU so that its memory shows, and a tiny one elsewhere."""
    if (folder / "config.json").is_file():
        return folder
    if family == "qwen3":
        width, layers, heads = (1024, 10, 16) if ON_GPU else (128, 2, 4)
        attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 64}
        wanted = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers} | attention | sizes
        config: Any = Qwen3Config(**IDS, **wanted, tie_word_embeddings=False)
    else:
        config = DeepseekV3Config.from_json_file(str(Path(__file__).parents[2] / "configs" / "models" / "tiny.json"))
        config.update(IDS)
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    causal_lm.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def engine(folder: Path, *, learning_rate: float = 1e-3, mtp: MtpConfig | None = None, **trainer: Any) -> TrainEngine:
    optimizer = OptimizerConfig(learning_rate=learning_rate)
    return TrainEngine(TrainSpec(folder, "bfloat16", TrainerConfig(**trainer), optimizer, 10, mtp=mtp))


def conversations(count: int = 12, length: int = 40) -> list[Tree]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(length // 2, length, count)
    return [Tree(rng.integers(3, 200, n).tolist(), root_mask=[0] + [1] * (int(n) - 1)) for n in lengths]


def rows(trees: list[Tree], micro_batch_tokens: int = 256) -> list[MicroBatch]:
    return shard(trees, num_ranks=1, micro_batch_tokens=micro_batch_tokens)[0]


def train(rank: TrainEngine, batch: list[MicroBatch]) -> tuple[float, float]:
    """Loss and gradient norm of one update."""
    tokens = float(sum(len(row.target_N) for row in batch))
    loss = rank.forward_backward(batch, tokens).loss
    norm = rank.optim_step()["train/grad_norm"]
    assert np.isfinite([loss, norm]).all(), f"loss {loss}, gradient norm {norm}"
    return loss, norm


def assert_same(name: str, values: Any, expected: Any, tolerance: float) -> None:
    gap = float(np.max(np.abs(np.asarray(values) / np.asarray(expected) - 1)))
    assert gap <= tolerance, f"{name}: {values} instead of {expected}, {gap:.1e} off, {tolerance:.0e} is allowed"


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if ON_GPU else 0


def determinism(folder: Path) -> str:
    """A rank trains by default. With `trainer.deterministic` two ranks train alike to the bit."""
    batch, path = rows(conversations()), model(folder / "model")
    default = engine(path)
    expected = [train(default, batch) for _ in range(3)]
    is_on = torch.are_deterministic_algorithms_enabled()
    assert is_on != ON_GPU, f"by default deterministic algorithms are {'on' if is_on else 'off'}"
    series = []
    for _ in range(2):
        rank = engine(path, deterministic=True)
        series.append([train(rank, batch) for _ in range(3)])
    assert series[0] == series[1], f"the same three updates gave {series[0]} and {series[1]}"
    assert_same("deterministic updates", series[0], expected, 1e-2)
    return f"equal to the bit, losses {', '.join(f'{loss:.4f}' for loss, _ in series[0])}"


def update_of(folder: Path, family: str) -> str:
    path = model(folder / family, family)
    rank = engine(path)
    batch = rows(conversations())
    own = np.concatenate(rank.logprobs(batch))
    causal_lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(rank.device).eval()
    gaps, start = [], 0
    with torch.no_grad():
        for row in batch:
            for ids in torch.from_numpy(row.token_ids_T).split(row.lengths):
                logits = causal_lm(ids.to(rank.device)[None]).logits[0, :-1].log_softmax(-1)
                expected = logits.gather(1, ids[1:].to(rank.device)[:, None])[:, 0].cpu().numpy()
                gaps.append(np.abs(own[start : start + len(expected)] - expected))
                start += len(expected)
    gap = float(np.concatenate(gaps).mean())
    assert gap < 0.05, f"{family}: log-probabilities differ from float32 transformers by {gap:.3f} nats a token"
    losses = [train(rank, batch)[0] for _ in range(6)]
    assert losses[-1] < 0.97 * losses[0], f"{family}: six updates on one batch moved the loss from {losses}"
    return f"{family}: {gap:.1e} nats from float32, loss {losses[0]:.2f} -> {losses[-1]:.2f}"


def update(folder: Path) -> str:
    """One rank joins its process group and trains a dense model and one with experts in bfloat16."""
    backend = "nccl" if ON_GPU else "gloo"
    details = [update_of(folder, family) for family in ("qwen3", "deepseek_v3")]
    assert torch.distributed.get_backend() == backend
    return f"{backend}; " + "; ".join(details)


def gradient_sums(folder: Path) -> str:
    """The gradient of 384 equal rows is 384 times that of one. In sums of bfloat16 it is 375 times."""
    copies = 384
    path, [row] = model(folder / "model"), rows(conversations(1))
    ratios = {}
    for stage in (1, 2, 3):
        rank = engine(path, learning_rate=1e-12, zero_stage=stage)  # too small to move a weight in bfloat16
        norms = []
        for batch in ([row], [row] * copies):
            rank.forward_backward(batch, float(len(row.target_N)))
            norms.append(rank.optim_step()["train/grad_norm"])
        ratios[stage] = norms[1] / norms[0]
    detail = ", ".join(f"ZeRO-{stage} {ratio:.2f}" for stage, ratio in ratios.items())
    assert all(abs(ratio / copies - 1) < 1e-3 for ratio in ratios.values()), f"not {copies} times as large: {detail}"
    return f"norm of {copies} rows over that of one: {detail}"


def ranks_of_each_stage(folder: Path) -> Iterator[tuple[int, TrainEngine]]:
    for stage in ZERO_STAGES:
        yield stage, engine(model(folder / "model"), zero_stage=stage)


def states(folder: Path) -> str:
    """A rank that leaves its device gives its memory back, and trains on as if it had stayed."""
    batch = rows(conversations())
    details = []
    for stage in ZERO_STAGES:
        before = allocated()
        rank = engine(model(folder / "model"), zero_stage=stage)
        stayed = engine(model(folder / "model"), zero_stage=stage)
        expected = [train(stayed, batch) for _ in range(3)]
        del stayed
        first = train(rank, batch)
        awake = allocated() - before
        rank.to(DeviceState.ASLEEP)
        asleep, reserved = allocated() - before, torch.cuda.memory_reserved() if ON_GPU else 0
        rank.to(DeviceState.AWAKE)
        assert_same(f"updates under ZeRO-{stage}", [first, train(rank, batch), train(rank, batch)], expected, 1e-2)
        assert asleep <= 0.05 * awake, f"ZeRO-{stage}: {asleep / GIB:.2f} of {awake / GIB:.2f} GiB stay while asleep"
        details.append(f"ZeRO-{stage} {awake / GIB:.2f} -> {asleep / GIB:.2f} GiB, {reserved / GIB:.2f} reserved")
        del rank
    return "; ".join(details) if ON_GPU else "updates agree; no memory to measure"


def checkpoints(folder: Path) -> str:
    """Files of a rank that has slept and holds only its weights hold them, and transformers loads them."""
    batch = rows(conversations())
    for stage, rank in ranks_of_each_stage(folder):
        train(rank, batch)
        rank.to(DeviceState.ASLEEP)
        rank.to(DeviceState.WEIGHTS)
        weights = {name: x.cpu().clone() for layer in rank.layer_weights() for name, x in layer.items()}
        rank.save_hf(folder / f"hf-{stage}")
        files = [load_file(file) for file in sorted((folder / f"hf-{stage}").glob("*.safetensors"))]
        written = {name: x for file in files for name, x in file.items()}
        loaded = AutoModelForCausalLM.from_pretrained(folder / f"hf-{stage}", dtype=torch.bfloat16).state_dict()
        assert written.keys() == weights.keys() == loaded.keys()
        for name, expected in weights.items():
            assert expected.numel() and torch.equal(written[name], expected), f"ZeRO-{stage}: file of '{name}' differs"
            assert torch.equal(loaded[name], expected), f"ZeRO-{stage}: transformers loads another '{name}'"
    return f"equal to the bit under ZeRO-{', '.join(map(str, ZERO_STAGES))}"


def save(rank: TrainEngine, folder: Path) -> None:
    """Write a training state, and wait for it."""
    folder.mkdir()
    rank.begin_save(folder)
    assert rank.end_save(None)


def resume(folder: Path) -> str:
    """A training state written under ZeRO-1 continues under ZeRO-3."""
    batch = rows(conversations())
    first, other = (engine(model(folder / "model"), zero_stage=stage) for stage in (1, 3))
    train(first, batch)
    save(first, folder / "state")
    expected = [train(first, batch) for _ in range(2)]
    other.load(folder / "state")
    assert_same("updates after a resume", [train(other, batch) for _ in range(2)], expected, 1e-2)
    return f"ZeRO-1 -> ZeRO-3, losses {expected[0][0]:.4f}, {expected[1][0]:.4f}"


def offload(folder: Path) -> str:
    """The optimizer, and the weights, in the machine's memory train as on the device."""
    batch = rows(conversations())
    series = {}
    for name, stage, config in (
        ("none", 3, None),
        ("optimizer", 1, OffloadConfig()),
        ("weights", 3, OffloadConfig(parameters=True)),
    ):
        before = allocated()
        rank = engine(model(folder / "model"), zero_stage=stage, offload=config)
        series[name] = ([train(rank, batch) for _ in range(3)], (allocated() - before) / GIB)
        del rank
    for name in ("optimizer", "weights"):
        assert_same(f"updates with {name} offloaded", series[name][0], series["none"][0], 1e-2)
    return "GiB on the device: " + ", ".join(f"{name} {gib:.2f}" for name, (_, gib) in series.items())


def offload_nvme(folder: Path) -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise Skip("DeepSpeed can't build async_io here: apt install libaio-dev, and nvcc of the CUDA toolkit")
    config = OffloadConfig(parameters=True, nvme=str(folder))
    rank = engine(model(folder / "model"), zero_stage=3, offload=config)
    batch = rows(conversations())
    losses = [train(rank, batch)[0] for _ in range(3)]
    save(rank, folder / "state")
    assert losses[-1] < losses[0]
    return f"losses {losses}"


def mtp(folder: Path) -> str:
    rank = engine(model(folder / "v3", "deepseek_v3"), mtp=MtpConfig())
    batch = rows(conversations())
    tokens = float(sum(len(row.target_N) for row in batch))
    first = rank.forward_backward(batch, tokens)
    rank.optim_step()
    losses = [train(rank, batch)[0] for _ in range(5)]
    assert losses[-1] < first.loss, f"loss {first.loss} -> {losses}"
    return f"loss {first.loss:.2f} -> {losses[-1]:.2f}, sums {sorted(first.sums)}"


def fp8_training(folder: Path) -> str:
    if ON_GPU and torch.cuda.get_device_capability() != (9, 0):
        raise Skip("needs Hopper, compute capability (9, 0)")
    batch = rows(conversations())
    path = model(folder / "model")
    losses = {}
    for fp8 in (False, True):
        rank = engine(path, fp8=fp8)
        losses[fp8] = [train(rank, batch)[0] for _ in range(4)]
    assert losses[True] != losses[False], "FP8 changes nothing: no layer was quantised"
    assert_same("losses in FP8", losses[True], losses[False], 0.05)
    return f"losses {losses[True]} in FP8, {losses[False]} in bfloat16"
