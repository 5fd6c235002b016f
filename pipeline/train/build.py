"""Build a rank's model and its DeepSpeed engine from a TrainSpec.

The settings of torch and DeepSpeed that correct their behaviour are all set here.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.balance import V2Balance
from pipeline.models.cut_down import cut_down
from pipeline.models.experts import skip_dropped
from pipeline.models.fp8_layers import use_fp8_in_sharded_experts
from pipeline.models.logprobs import LogprobModel, refuse_other_logits, refuse_randomness
from pipeline.models.mtp import Mtp, mtp_as_layers
from pipeline.models.score import ScoreModel, refuse_other_scores
from pipeline.train.expert_parallel import ExpertSharding
from pipeline.train.moments import BF16MomentsAdamW
from pipeline.train.spec import FrozenModel, TrainSpec
from pipeline.weights.adapters import prepare_adapters
from pipeline.weights.fill import fill
from pipeline.weights.load import unfilled_model, unfilled_with_mtp
from pipeline.weights.reader import CheckpointReader
from pipeline.weights.reward_model import unfilled_new_score_model, unfilled_score_model
from rollout.checkpoint import is_reward_model
from rollout.process import bind_stores

import deepspeed  # isort: skip  after pipeline.weights.load, which sets DS_ACCELERATOR
from deepspeed.utils.groups import _get_expert_data_parallel_group as expert_data_group  # isort: skip


def prepare_torch(deterministic: bool | Literal["auto"]) -> torch.device:
    """Set torch and DeepSpeed up, and return this rank's device. `auto` is deterministic on CPUs."""
    on_cuda = torch.cuda.is_available()
    if deterministic is True or (deterministic == "auto" and not on_cuda):
        # Without determinism, the CPU's scatter-add sums in the order of arrival, so a resume is not exact. Costs 1 %.
        torch.use_deterministic_algorithms(True)
        # Determinism fills every empty buffer with NaN, ZeRO's too, which takes two thirds of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        # cuBLAS sums in a fixed order with workspaces of a fixed size only; without them torch refuses every product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if on_cuda:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    # The shared-memory op compiles for two minutes at the first start on a machine, and gloo works without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return torch.device("cpu")


def join_ranks(device: torch.device) -> None:
    """Join the process group of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment."""
    bind_stores()
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def build_engine(spec: TrainSpec, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Build the `transformers` model of `spec`, and the DeepSpeed engine of the LogprobModel or ScoreModel around it.

    The model is read a layer at a time, and a rank keeps of each layer what its ZeRO stage and expert parallelism leave
    to it. Raises ValueError for a model that can't be trained exactly.
    """
    causal_lm, model = build_score_model(spec) if spec.is_reward_model else build_causal_lm(spec)
    if spec.lora is not None:
        prepare_adapters(causal_lm, spec.lora)
    with mtp_as_layers(model.mtp if isinstance(model, LogprobModel) else None, causal_lm):
        drops = isinstance(spec.balance, V2Balance) and spec.balance.capacity is not None
        _fill(causal_lm, spec.model, spec, device, drops=drops)
        if drops:
            skip_dropped(causal_lm)
        if spec.trainer.gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    adamw = BF16MomentsAdamW if spec.optimizer.moments == "bfloat16" else torch.optim.AdamW
    optimizer = adamw(
        parameter_groups(model, spec.optimizer.weight_decay),
        lr=0.0,  # until optim_step sets it
        betas=(spec.optimizer.betas[0], spec.optimizer.betas[1]),
        fused=True,
    )
    initialized: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(spec))
    engine = initialized[0]
    if spec.dtype == "bfloat16":
        sum_in_float32(engine, spec.trainer.zero_stage)
    engine.basic_optimizer.state.clear()  # without ZeRO, in bfloat16, DeepSpeed has made an empty step
    engine.enable_backward_allreduce = spec.trainer.zero_stage > 0  # without ZeRO, TrainEngine reduces and clips
    return causal_lm, engine


def build_frozen(frozen: FrozenModel, spec: TrainSpec, device: torch.device, *, checks: bool = False) -> nn.Module:
    """Build a frozen model beside the trained one, such as the reference that KL terms refer to; sharded under ZeRO-3.

    checks: raise ValueError for a model whose log-probabilities can't be computed exactly. The copy of a model that is
    trained needs none.
    """
    causal_lm = unfilled_model(frozen.model, frozen.dtype)
    if checks:
        refuse_randomness(causal_lm)
        _on_first_rank(lambda: refuse_other_logits(cut_down(causal_lm)))
    model = LogprobModel(causal_lm, fp8=spec.trainer.fp8)
    model.eval().requires_grad_(False)
    spec = replace(spec, dtype=frozen.dtype)
    _fill(model.causal_lm, frozen.model, spec, device)
    if spec.trainer.zero_stage < 3:
        return model
    initialized: Any = deepspeed.initialize(model=model, config=deepspeed_config(spec))
    initialized[0].eval()
    return initialized[0]


def destroy_frozen(model: nn.Module) -> None:
    """Take DeepSpeed's hooks off what `build_frozen` made, so that it can be freed."""
    if isinstance(model, deepspeed.DeepSpeedEngine):
        model.destroy()


def build_causal_lm(spec: TrainSpec) -> tuple[PreTrainedModel, LogprobModel]:
    """Make the language model of `spec` on the meta device and wrap it to return log-probabilities.

    Raises ValueError for a model that can't be trained exactly, and for routing replay without known routers.
    """
    if spec.mtp is None:
        model, mtp = unfilled_model(spec.model, spec.dtype), None
    else:
        model, layers = unfilled_with_mtp(spec.model, spec.dtype, spec.mtp.depth)
        mtp = Mtp(model, layers, detached=spec.mtp.detached)
    refuse_randomness(model)
    _on_first_rank(lambda: refuse_other_logits(cut_down(model)))
    policy = LogprobModel(model, fp8=spec.trainer.fp8, mtp=mtp)
    if spec.routing_replay and not policy.routers:
        raise ValueError(
            f"routing_replay has no effect on {type(model).__name__}, which has no routers of a kind known to "
            "pipeline.models.routing; set it to none"
        )
    return model, policy


def build_score_model(spec: TrainSpec) -> tuple[PreTrainedModel, ScoreModel]:
    """Make the reward model of `spec` on the meta device, or a new head on its language model, and wrap it to return
    scores."""
    if is_reward_model(spec.model):
        model = unfilled_score_model(spec.model, spec.dtype)
    else:
        model = unfilled_new_score_model(spec.model, spec.dtype, spec.head_seed)
    refuse_randomness(model)
    _on_first_rank(lambda: refuse_other_scores(cut_down(model)))
    return model, ScoreModel(model, fp8=spec.trainer.fp8)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters for AdamW, with weight decay on matrices only.

    A rank's experts, which fewer ranks share than other weights, get groups of their own, marked for DeepSpeed.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 its own is that of no values
        name, decays = getattr(parameter, "group_name", ""), len(shape) >= 2
        marks = {"moe": True, "name": name} if name else {}
        group = groups.setdefault(
            (name, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0} | marks
        )
        group["params"].append(parameter)
    return list(groups.values())


def sum_in_float32(engine: Any, zero_stage: int) -> None:
    """Let gradients of weights in bfloat16 be float32 from the first sum on: over uses of a weight, rows and ranks.

    See docs/decisions/0014-training-on-gpus.md.
    """
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32
    if zero_stage in (1, 2):
        # `data_types.grad_accum_dtype` would select BF16_Optimizer at stage 1, which can't sleep, and leave the buffers
        # of stage 2 in bfloat16 (DeepSpeed 0.19.8: engine.py, line 2305; zero/stage_1_and_2.py, line 1253).
        engine.optimizer.gradient_accumulation_dtype = torch.float32
        engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32


def deepspeed_config(spec: TrainSpec) -> dict[str, Any]:
    """Return the settings for `deepspeed.initialize`."""
    offload = spec.trainer.offload
    parts = ["offload_optimizer"] * (offload is not None) + ["offload_param"] * bool(offload and offload.parameters)
    target = {"device": "nvme", "nvme_path": offload.nvme} if offload and offload.nvme else {"device": "cpu"}
    precision: dict[str, Any] = {}
    if spec.dtype == "bfloat16":
        precision["communication_data_type"] = "fp32"
        if spec.trainer.zero_stage == 3:
            precision["data_types"] = {"grad_accum_dtype": "fp32"}
    return precision | {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # backward only accumulates; step reduces and updates
        "gradient_clipping": spec.optimizer.max_grad_norm if spec.trainer.zero_stage else 0.0,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "zero_optimization": {"stage": spec.trainer.zero_stage} | dict.fromkeys(parts, target),
        "zero_force_ds_cpu_optimizer": False,  # keep the AdamW built here when the optimizer is offloaded
        "zero_allow_untested_optimizer": True,  # for our AdamW with moments in bfloat16
    }


def _on_first_rank(check: Callable[[], None]) -> None:
    """Let the first rank check what is the same on all; every rank raises its ValueError."""
    distributed = torch.distributed.is_initialized()
    verdict: list[str | None] = [None]
    if not distributed or torch.distributed.get_rank() == 0:
        try:
            check()
        except ValueError as error:
            verdict = [str(error)]
    if distributed:
        torch.distributed.broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise ValueError(verdict[0])


def _fill(model: PreTrainedModel, folder: Path, spec: TrainSpec, device: torch.device, *, drops: bool = False) -> None:
    """Read the weights of `model` from the checkpoint; of each layer keep this rank's part before the next is read."""
    trainer = spec.trainer
    experts = (
        ExpertSharding(model, trainer.expert_parallel_size, drops=drops) if trainer.expert_parallel_size > 1 else None
    )
    partition = _Partition(nn.Module(), config_dict_or_path=deepspeed_config(spec)) if trainer.zero_stage == 3 else None

    def keep() -> None:
        if experts is not None:
            experts.shard()
        if partition is not None:
            partition.take(model, getattr(torch, spec.dtype))

    fill(model, CheckpointReader(folder), device, keep)
    if experts is not None and trainer.fp8:
        use_fp8_in_sharded_experts(model)


class _Partition(deepspeed.zero.Init):
    """ZeRO-3's partition of weights that every rank holds whole, so none has to be sent."""

    def take(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keep this rank's part of the parameters that have values and are whole."""
        whole: list[Any] = [x for x in model.parameters() if not (x.is_meta or hasattr(x, "ds_id"))]
        for parameter in whole:
            parameter.data = parameter.data.to(dtype)
            if group := getattr(parameter, "group_name", None):
                parameter.ds_zero_partition_process_group = expert_data_group(group)
        self._convert_to_zero_parameters(whole)

    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()
