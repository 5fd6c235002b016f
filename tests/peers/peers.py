"""The losses of TRL, verl and OpenRLHF, each called as a function of the same batch.

`make test-peers` installs the three without their dependencies into .venv-peers. TRL's losses are methods of trainers:
they get a stand-in for the trainer, whose model returns the batch's log-probabilities. Of verl and OpenRLHF only the
modules of losses are imported, without their packages' __init__, which import engines.

Legend: B completions, T most tokens of a completion.
"""

import sys
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

FOLDER = Path(__file__).parents[2] / ".venv-peers"
VERSIONS = {d.name.lower(): d.version for d in distributions(path=[str(FOLDER)])}


class PaddedBatch(NamedTuple):
    """Completions padded to T; float64 [B, T], advantages [B]. mask: 1 for tokens of the completion.

    logprobs: the policy's. old: of the policy before the update. rollout: of the engine. reference: of the reference.
    """

    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    reference: Tensor
    mask: Tensor
    advantages: Tensor


class Actor(SimpleNamespace):
    """verl's ActorConfig as its losses read it."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def _shell(name: str, **attributes: Any) -> ModuleType:
    """Put a module into sys.modules that finds its submodules in FOLDER and runs no __init__."""
    module = ModuleType(name)
    module.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    sys.modules[name] = module
    return module


def load() -> SimpleNamespace:
    """Import the peers' modules of losses."""
    sys.path.append(str(FOLDER))  # behind this environment's own packages
    for name in ("openrlhf", "openrlhf.models", "verl", "verl.trainer", "verl.trainer.ppo", "verl.workers"):
        _shell(name)
    # Modules that verl's losses import for the names in their annotations, and for one check of a type.
    _shell("tensordict", TensorDict=object)
    _shell("verl.protocol", DataProto=object)
    _shell("verl.trainer.config", AlgoConfig=dict)
    _shell("verl.trainer.config.algorithm", RolloutCorrectionConfig=object)
    _shell("verl.workers.config", ActorConfig=Actor)
    _shell("verl.workers.config.actor", PolicyLossConfig=object)
    utils = _shell("verl.utils")
    from verl.utils import groupwise  # pyright: ignore

    utils.as_torch_index, utils.group_mean_std = groupwise.as_torch_index, groupwise.group_mean_std  # type: ignore
    from openrlhf.models import loss as openrlhf  # pyright: ignore
    from openrlhf.models.utils import compute_approx_kl  # pyright: ignore
    from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore
    from trl.trainer.reward_trainer import RewardTrainer  # pyright: ignore
    from trl.trainer.rloo_trainer import RLOOTrainer  # pyright: ignore
    from verl.trainer.ppo import core_algos, rollout_corr_helper  # pyright: ignore

    return SimpleNamespace(
        grpo=GRPOTrainer,
        rloo=RLOOTrainer,
        dpo=DPOTrainer,
        rm=RewardTrainer,
        verl=core_algos,
        correction=rollout_corr_helper,
        openrlhf=openrlhf,
        approx_kl=compute_approx_kl,
    )


def trainer_stand_in(**settings: Any) -> SimpleNamespace:
    """A trainer of TRL in evaluation, alone, as far as its losses and metrics read it."""
    same: Any = lambda x, **_: x  # noqa: E731
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same, reduce=same, num_processes=1, device="cpu"),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **settings,
    )


def trl_policy_loss(trainer: Any, batch: PaddedBatch, **settings: Any) -> Tensor:
    """The loss of TRL's GRPOTrainer or RLOOTrainer."""
    arguments = {"use_bias_correction_kl": settings.pop("unbiased", False), "delta": settings.pop("delta", None)}
    defaults: dict[str, Any] = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "off_policy_mask_threshold": None,
    }
    stand_in = trainer_stand_in(
        **defaults | settings,
        args=SimpleNamespace(**arguments),
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, batch.mask * 0.0, None),
        get_off_policy_mask=getattr(trainer, "get_off_policy_mask", None),
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=batch.mask.shape[1],
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": batch.mask[:, :1],
        "prompt_mask": batch.mask[:, :1],
        "completion_ids": batch.mask,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "old_logps": (batch.old * batch.mask).sum(1),
        "sampling_per_token_logps": batch.rollout,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": batch.mask.sum(),
    }
    return trainer._compute_loss(stand_in, None, inputs)


def trl_dpo_loss(trainer: Any, batch: PaddedBatch, kind: str, beta: float, smoothing: float) -> Tensor:
    """The loss of TRL's DPOTrainer on a batch whose first half is chosen; its reference is precomputed."""
    mask = batch.mask.long()
    columns = dict.fromkeys(("entropy", "mean_logits"), mask * 0.0) | {"is_top1": mask.bool()}
    stand_in = trainer_stand_in(
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    chosen, rejected = (batch.reference * batch.mask).sum(1).chunk(2)
    inputs = {
        "input_ids": mask.new_zeros(len(mask), 1 + mask.shape[1]),
        "attention_mask": mask,
        "completion_mask": mask.new_zeros(len(mask), 1 + mask.shape[1]),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    inputs["completion_mask"][:, 1:] = mask
    outputs = SimpleNamespace(log_probs=batch.logprobs * batch.mask, **columns)
    return trainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)


def trl_reward_loss(trainer: Any, scores: Tensor, margin: Tensor | None, center: float | None) -> Tensor:
    """The loss of TRL's RewardTrainer on scores, the first half of them chosen."""
    stand_in = trainer_stand_in(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs: dict[str, Any] = {} if margin is None else {"margin": margin}
    return trainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
