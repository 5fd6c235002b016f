"""What a rank builds from its spec: the model that the spec names, and DeepSpeed's settings for it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from configs.sft import MtpConfig
from pipeline.models.logprobs import LogprobModel, refuse_other_logits, refuse_randomness
from pipeline.models.mtp import Mtp
from pipeline.train.spec import TrainSpec
from pipeline.weights.load import load_model, load_with_mtp
from pipeline.weights.reward_model import (
    ScoreModel,
    is_score_model,
    load_score_model,
    new_score_model,
    refuse_other_scores,
)


def causal_lm(spec: TrainSpec) -> tuple[PreTrainedModel, nn.Module]:
    """The language model that `spec` names, and what is trained: the model that answers with log-probabilities.

    Raises ValueError for a model that can't be trained exactly, and for routes to replay where no router would hear.
    """
    model, mtp = _with_mtp(spec, spec.mtp) if spec.mtp else (load_model(spec.model, spec.dtype), None)
    refuse_randomness(model)
    refuse_other_logits(model)
    policy = LogprobModel(model, fp8=spec.trainer.fp8, mtp=mtp)
    if spec.routing_replay and not policy.routers:
        raise ValueError(
            f"routing_replay has no effect on {type(model).__name__}, which has no routers of a kind known to "
            "pipeline.models.routing; set it to none"
        )
    return model, policy


def _with_mtp(spec: TrainSpec, config: MtpConfig) -> tuple[PreTrainedModel, Mtp]:
    model, layers = load_with_mtp(spec.model, spec.dtype, config.depth)
    return model, Mtp(model, layers, detached=config.detached)


def score_model(spec: TrainSpec) -> tuple[PreTrainedModel, nn.Module]:
    """The reward model that `spec` names, or a new one on its language model, and what is trained: one that answers
    with scores."""
    if is_score_model(spec.model):
        model = load_score_model(spec.model, spec.dtype)
    else:
        model = new_score_model(spec.model, spec.dtype, spec.head_seed)
    refuse_randomness(model)
    refuse_other_scores(model)
    return model, ScoreModel(model, fp8=spec.trainer.fp8)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices only: norms and biases keep their scale. What is sharded over fewer ranks than all, a rank's
    experts, has groups of its own, marked as DeepSpeed wants them."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        name, decays = getattr(parameter, "group_name", ""), parameter.dim() >= 2
        marks = {"moe": True, "name": name} if name else {}
        group = groups.setdefault(
            (name, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0} | marks
        )
        group["params"].append(parameter)
    return list(groups.values())


def deepspeed_config(spec: TrainSpec) -> dict[str, Any]:
    """The settings that `deepspeed.initialize` gets."""
    offload = spec.trainer.offload
    offloaded = ["offload_optimizer"] * (offload is not None) + ["offload_param"] * bool(offload and offload.parameters)
    place = {"device": "nvme", "nvme_path": offload.nvme} if offload and offload.nvme else {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # backward only accumulates; step reduces and updates
        "gradient_clipping": spec.optimizer.max_grad_norm if spec.trainer.zero_stage else 0.0,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "zero_optimization": {"stage": spec.trainer.zero_stage} | dict.fromkeys(offloaded, place),
        "zero_force_ds_cpu_optimizer": False,  # an offloaded optimizer stays the AdamW built here
        "zero_allow_untested_optimizer": True,  # our AdamW with moments in bfloat16
    }
