"""Expert parallelism: each rank holds a part of every layer's routed experts, and tokens are sent to them.

DeepSpeed's AutoEP replaces the MoE blocks of a model by its own layer: two all-to-alls around a grouped product. Its
router is not used, because it would choose other experts than the rollout engine: it multiplies in the model's dtype,
where DeepSeek's gates use float32, and limits a V2 model by groups, where `greedy` routing has none. The model's own
gate keeps its place and name, with `pipeline.models.routing` around it.

The layers are replaced before the optimizer is created, because `deepspeed.initialize` would not find them in the
wrapped model.

Legend: E experts of a layer, e of them on this rank, D model width, I width of an expert.
"""

import pipeline.weights.load  # noqa: F401  # isort: skip  sets DS_ACCELERATOR before deepspeed reads it
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    _AllToAllV,
    combine_from_routed,
    compute_split_plan,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.experts import EXPERT_PARALLEL_FAMILIES
from pipeline.weights.fused import checkpoint_tensors


class ExpertSharding:
    """Lets a rank keep its part of the experts of `model`; ranks r * size to r * size + size - 1 hold each expert once.

    Afterwards every rank must take part in every forward pass.
    """

    def __init__(self, model: PreTrainedModel, size: int, *, drops: bool = False) -> None:
        """drops: pairs of a token and an expert may be dropped (see pipeline.train.balancer); they are not sent.

        Raises ValueError for a model without experts, of another family than EXPERT_PARALLEL_FAMILIES, or whose number
        of experts `size` does not divide.
        """
        setting, family = f"trainer.expert_parallel_size={size}", model.config.model_type
        config = AutoEPConfig(
            enabled=True, autoep_size=size, use_grouped_mm=torch.cuda.is_available(), load_balance_coeff=None
        )
        self._auto_ep = AutoEP(model, config)
        self._whole = self._auto_ep.ep_parser() if family in EXPERT_PARALLEL_FAMILIES else []
        if not self._whole:
            raise ValueError(
                f"{setting} needs a mixture of experts of one of {', '.join(EXPERT_PARALLEL_FAMILIES)}, and the model "
                f"is '{family}'{' without routed experts' * (family in EXPERT_PARALLEL_FAMILIES)}; set it to 1"
            )
        self._model, self._size, self._drops = model, size, drops
        self._num_experts = self._whole[0].num_experts
        if self._num_experts % size:
            raise ValueError(f"{setting} must divide the model's {self._num_experts} routed experts")

    def shard(self) -> None:
        """Keep this rank's experts of the layers whose weights have values by now."""
        for spec in list(self._whole):
            block: Any = self._model.get_submodule(spec.moe_module_name)
            if any(x.is_meta for x in block.parameters()):
                continue
            self._whole.remove(spec)
            self._auto_ep.replace_moe_layers(
                [spec], ep_size=self._size, ep_rank=torch.distributed.get_rank() % self._size
            )
            layer: Any = self._model.get_submodule(spec.moe_module_name)
            del layer.router
            layer.gate = block.gate
            # Not a submodule, so that the gate's weights keep a single name.
            layer.__dict__["router"] = partial(_route, block.gate, self._num_experts)
            _rename(layer, "shared_experts", spec.shared_experts_name)
            _rename(layer, "shared_experts_gate", spec.shared_experts_gate_name)
            layer.set_deepspeed_parallelism()
            if self._drops:
                layer.__dict__["_forward"] = partial(_forward_kept, layer)


def _rename(layer: Any, name: str, own: str | None) -> None:
    """Give AutoEP's module `name` the name `own` of the model's block, for AutoEP to find under both."""
    module = getattr(layer, name)
    if module is not None and own is not None and own != name:
        delattr(layer, name)
        layer.add_module(own, module)
        layer.__dict__[name] = module


def expert_group(model: nn.Module) -> Any | None:
    """Return the process group of the ranks that share this rank's experts; None where it holds all."""
    return next((layer.ep_group for layer in model.modules() if isinstance(layer, AutoEPMoELayer)), None)


def as_fused(model: nn.Module, layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace AutoEP's tensors of this rank's experts in `layer` by `transformers`' tensors of all experts.

    w1 [e, I, D], w3 [e, I, D] and w2 [e, D, I] of all ranks become gate_up_proj [E, 2 I, D] and down_proj [E, D, I] on
    every rank. Every rank must call this.
    """
    fused = dict(layer)
    for stem in _expert_stems(layer):
        w1, w2, w3 = (fused.pop(stem + part) for part in ("w1", "w2", "w3"))
        group = model.get_submodule(stem.removesuffix(".experts.")).ep_group
        fused[stem + "gate_up_proj"] = _all_gather(torch.cat([w1, w3], dim=1), group)
        fused[stem + "down_proj"] = _all_gather(w2, group)
    return fused


def pop_own_experts(model: PreTrainedModel, layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take AutoEP's tensors of this rank's experts out of `layer`; return views of them under checkpoint names."""
    own: dict[str, Tensor] = {}
    for stem in _expert_stems(layer):
        w1, w2, w3 = (layer.pop(stem + part) for part in ("w1", "w2", "w3"))
        num_own, width, _ = w1.shape
        block: Any = model.get_submodule(stem.removesuffix(".experts."))
        # Only a tensor on the meta device is fused, and the place of each of its parts says which to take.
        fused = torch.empty(num_own, 2 * width, w1.shape[2], device="meta")
        named = checkpoint_tensors(model, {stem + "gate_up_proj": fused, stem + "down_proj": w2})
        for name, part in named.items():
            expert, half = divmod(int(part.storage_offset()) // w1[0].numel(), 2)
            tensor = (w1, w3)[half][expert] if part.is_meta else part
            own[_of_all_experts(name, block.ep_rank * num_own)] = tensor
    return own


class FusedPlace(NamedTuple):
    """The place of a rank's parameter in a tensor of the model, both flat: runs of `run` elements, `stride` apart."""

    name: str
    shape: tuple[int, ...]
    first: int
    run: int
    stride: int

    def runs(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield the runs of elements `start` to `start + length` of the parameter: their start in the tensor, their
        start in the parameter, and their length."""
        while length > 0:
            number, offset = divmod(start, self.run)
            part = min(self.run - offset, length)
            yield self.first + number * self.stride + offset, start, part
            start, length = start + part, length - part


def place_in_fused(model: nn.Module, name: str, shape: Sequence[int]) -> FusedPlace:
    """Return the place of this rank's parameter `name`, of this `shape`, among the tensors of `as_fused`."""
    stem, _, part = name.rpartition(".")
    layer: Any = model.get_submodule(stem.removesuffix(".experts"))
    if part not in ("w1", "w2", "w3") or not isinstance(layer, AutoEPMoELayer):
        return FusedPlace(name, tuple(shape), 0, math.prod(shape), math.prod(shape))
    (_, rows, columns), first_expert = shape, layer.ep_rank * layer.num_local_experts
    size = rows * columns
    if part == "w2":
        return FusedPlace(f"{stem}.down_proj", (layer.num_experts, rows, columns), first_expert * size, size, size)
    first = (2 * first_expert + (part == "w3")) * size
    return FusedPlace(f"{stem}.gate_up_proj", (layer.num_experts, 2 * rows, columns), first, size, 2 * size)


def _expert_stems(layer: Mapping[str, Tensor]) -> list[str]:
    """Return what the names of AutoEP's tensors in `layer` have before their last part."""
    return [name.removesuffix("w1") for name in layer if name.endswith(".experts.w1")]


def _of_all_experts(name: str, first: int) -> str:
    """Replace an expert's number on this rank by its number in the model, which is `first` more."""
    return re.sub(r"(?<=\.experts\.)\d+", lambda number: str(int(number[0]) + first), name)


def _all_gather(part: Tensor, group: Any) -> Tensor:
    size = torch.distributed.get_world_size(group)
    full = part.new_empty(size * len(part), *part.shape[1:])
    torch.distributed.all_gather_into_tensor(full, part.contiguous(), group=group)
    return full


def _route(gate: nn.Module, num_experts: int, hidden_TD: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
    """Replace AutoEP's router: return weights [T, K], experts [T, K], and the tokens of each expert [E]."""
    _, weights_TK, experts_TK = gate(hidden_TD)
    return weights_TK, experts_TK, count_tokens_per_expert(experts_TK, num_experts + 1)[:-1]  # without dropped pairs


def _forward_kept(layer: Any, hidden_BTD: Tensor) -> Tensor:
    """Replace AutoEP's forward pass, which sends every pair, by the same without dropped ones. They sort last."""
    batch, length, width = hidden_BTD.shape
    x_TD = hidden_BTD.flatten(0, 1)
    weights_TK, experts_TK, counts_E = layer.router(x_TD, None)
    order_S = experts_TK.flatten().argsort(stable=True)[: int(counts_E.sum())]
    sizes = layer.num_experts, layer.ep_size, layer.num_local_experts
    plan = compute_split_plan(experts_TK, *sizes, layer.ep_group, counts_E)
    sent_SD = x_TD[order_S // layer.top_k]
    received = _AllToAllV.apply(layer.ep_group, sent_SD, plan.input_splits, plan.output_splits)
    by_expert, indices, counts, num_received = permute_by_local_expert(received, plan.local_counts_by_source)
    outputs = unpermute_by_local_expert(layer.experts(by_expert, counts), indices, num_received)
    returned_SD = _AllToAllV.apply(layer.ep_group, outputs, plan.output_splits, plan.input_splits)
    combine = layer.top_k, layer.score_apply, layer.combine_impl
    combined = combine_from_routed(returned_SD, weights_TK, order_S, *combine, (batch, length, width))
    return layer._finalize_output(combined, x_TD, hidden_BTD, width)
