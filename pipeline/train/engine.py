"""The training engine: DeepSpeed behind two verbs, `forward_backward` and `optim_step`.

One instance is one rank; it knows micro-batches and a loss, no algorithm.
Gradients are sums over micro-batches and ranks of terms that already carry the batch's global denominator, so the
split of a batch can't change them: DeepSpeed's mean over ranks is undone by the number of ranks.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.train import TrainerConfig
from pipeline.data.trees import Floats, MicroBatch
from pipeline.models.attention import Layout
from pipeline.models.fp8_layers import use_fp8_in_sharded_experts
from pipeline.models.logprobs import LogprobModel
from pipeline.models.mtp import attached
from pipeline.models.rounding import rounded_anew
from pipeline.models.tokenizer import load_tokenizer
from pipeline.train.balancing import Balancer
from pipeline.train.build import causal_lm, deepspeed_config, parameter_groups, score_model
from pipeline.train.expert_parallel import as_fused, shard_experts
from pipeline.train.losses import batch_loss, loss_with_mtp
from pipeline.train.memory import StepMemory
from pipeline.train.moments import BF16MomentsAdamW
from pipeline.train.schedule import learning_rate
from pipeline.train.sleep import leave_device, return_to
from pipeline.train.spec import BatchSums, TrainSpec
from pipeline.train.state import layers, load_state, save_state
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import load_model, save_hf
from pipeline.weights.reward_model import save_score_model
from rollout.types import Routes
from rollout.weights import Bucket, to_buckets

import deepspeed  # isort: skip  must follow pipeline.weights.load, which sets DS_ACCELERATOR


class TrainEngine:
    """One rank's model, optimizer state and gradients.

    The process group is read from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
    """

    def __init__(self, spec: TrainSpec) -> None:
        self.spec = spec
        self.device = (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
        )
        # Exact resume needs it: without, the CPU's scatter-add sums in whatever order threads arrive (it costs 1 %).
        torch.use_deterministic_algorithms(True)
        # Else every empty buffer, ZeRO's above all, is filled with NaN first: two thirds of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        if self.device.type == "cpu":
            # Gloo serves; the shared-memory op would compile for two minutes at the first start of every machine.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.memory = StepMemory(self.device)
        deepspeed.init_distributed("nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        self.world_size = torch.distributed.get_world_size()
        self._model, model = score_model(spec) if spec.is_reward_model else causal_lm(spec)
        self._mtp = model.mtp if isinstance(model, LogprobModel) else None
        with attached(self._mtp, self._model):
            _spread_experts(self._model, spec.trainer)
            if spec.trainer.gradient_checkpointing:
                self._model.gradient_checkpointing_enable({"use_reentrant": False})
        adamw = BF16MomentsAdamW if spec.optimizer.moments == "bfloat16" else torch.optim.AdamW
        optimizer = adamw(
            parameter_groups(model, spec.optimizer.weight_decay),
            lr=0.0,  # until optim_step sets it
            betas=(spec.optimizer.betas[0], spec.optimizer.betas[1]),
            fused=True,
        )
        wrapped: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(spec))
        self.engine, self.optimizer = wrapped[0], wrapped[1]
        self.engine.basic_optimizer.state.clear()  # without ZeRO, in bfloat16, DeepSpeed made an empty step
        self.engine.enable_backward_allreduce = spec.trainer.zero_stage > 0  # see _clip_unsharded
        self.balancer = Balancer(self.engine.module.routers, spec.balance, self.device)
        self.reference = self._reference() if spec.with_reference else None
        self.step = 0

    def _reference(self) -> nn.Module:
        model = LogprobModel(load_model(self.spec.model, self.spec.dtype), fp8=self.spec.trainer.fp8)
        model.eval().requires_grad_(False)
        _spread_experts(model.causal_lm, self.spec.trainer)
        if self.spec.trainer.zero_stage < 3:
            return model.to(self.device)
        wrapped: Any = deepspeed.initialize(model=model, config=deepspeed_config(self.spec))
        wrapped[0].eval()
        return wrapped[0]

    def forward_backward(self, batch: list[MicroBatch], denominator: float) -> BatchSums:
        """Add the gradient of the loss over `batch` to what has accumulated since the last optim_step.

        denominator: what the loss is divided by, counted over all micro-batches and ranks.
        """
        self.engine.train()
        total = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        self.memory.begin(batch)
        self.balancer.begin_batch(batch)
        for row in batch:
            self.balancer.begin_row(row)
            answer = self._forward(self.engine, row)
            if self.spec.mtp is None:
                loss, row_sums, row_maxima = batch_loss(self.spec.objective, row, answer, denominator)
            else:
                loss, row_sums, row_maxima = loss_with_mtp(
                    self.spec.objective, row, answer, denominator, self.spec.mtp.weight
                )
            self.engine.backward(loss * self.world_size)
            total += loss.detach()
            for name, value in row_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in row_maxima.items():
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        count = sum(row.num_sequences if self.spec.is_reward_model else len(row.target_N) for row in batch)
        as_floats = ({name: value.item() for name, value in of.items()} for of in (sums, maxima))
        return BatchSums(count, total.item(), *as_floats)

    def optim_step(self) -> dict[str, float]:
        """Clip, update, forget the gradients. Returns the learning rate used, the gradient's global norm before
        clipping, how even the load of a mixture's experts was, and the rank's peak of memory."""
        self.step += 1
        config = self.spec.optimizer
        rate = learning_rate(
            config.schedule, peak=config.learning_rate, step=self.step, total_steps=self.spec.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self._clip_unsharded() if self.spec.trainer.zero_stage == 0 else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        balance = self.balancer.step()
        return {"train/learning_rate": rate, "train/grad_norm": float(norm)} | balance | self.memory.figures()

    def logprobs(self, batch: list[MicroBatch], *, reference: bool) -> list[Floats]:
        """Log-probability of every trained token under the policy or the reference, float32 [N] a micro-batch."""
        model = self.reference if reference else self.engine
        assert model is not None, "no reference was loaded"
        with torch.no_grad():
            return [self._forward(model, row).cpu().numpy() for row in batch]

    def logprobs_rounded_anew(self, batch: list[MicroBatch]) -> list[Floats]:
        """Log-probabilities as another program of the same precision might compute them (pipeline.models.rounding)."""
        with rounded_anew(self._model):
            return self.logprobs(batch, reference=False)

    def logprobs_and_experts(self, batch: list[MicroBatch]) -> list[tuple[Floats, Routes]]:
        """The policy's `logprobs`, and the experts that it sent each token of the row to."""
        return [
            (self.logprobs([row], reference=False)[0], self.engine.module.routers.chosen_TLK.short().cpu().numpy())
            for row in batch
        ]

    def scores(self, batch: list[MicroBatch]) -> list[Floats]:
        """A reward model's score of every answer, float32 [N] a micro-batch: what its model answers with."""
        return self.logprobs(batch, reference=False)

    def evaluate(self, batch: list[MicroBatch]) -> BatchSums:
        """Summed negative log-likelihood of the trained tokens, no gradient."""
        nll = -sum(float(values_N.sum(dtype=np.float64)) for values_N in self.logprobs(batch, reference=False))
        return BatchSums(sum(len(row.target_N) for row in batch), nll, {"eval/nll_mean": nll}, {})

    def layer_weights(self, *, with_mtp: bool = False) -> Iterator[dict[str, Tensor]]:
        """Weights by checkpoint name, a layer at a time; under ZeRO-3 only one layer is whole at a time, on every rank.

        A layer's tensors are valid until the next is asked for. `with_mtp`: those of modules for multi-token prediction
        too, which no engine that speaks has a place for.
        """
        model = self._model
        tied = set(model.all_tied_weights_keys)
        with attached(self._mtp if with_mtp else None, model):
            for layer in layers(model):
                with self._gathered(list(layer.values())):
                    held = {name: tensor.detach() for name, tensor in layer.items() if name not in tied}
                    held = as_fused(model, held)
                    yield checkpoint_tensors(model, held)

    def weight_buckets(self, bucket_mib: int, *, send: bool) -> Iterator[Bucket]:
        """The layers as buckets of about bucket_mib MiB, each valid until the next is asked for. Every rank takes part
        in gathering; a rank that does not `send` yields nothing."""
        for layer in self.layer_weights():
            if send:
                yield from to_buckets(((name, tensor.cpu()) for name, tensor in layer.items()), bucket_mib)

    def save_hf(self, folder: Path) -> None:
        """Write a plain `transformers` checkpoint; every rank takes part, rank 0 writes each layer when it is whole."""
        parts = self.layer_weights(with_mtp=True)
        if torch.distributed.get_rank() == 0:
            write = save_score_model if self.spec.is_reward_model else save_hf
            write(self._model, load_tokenizer(self.spec.model, self.spec.chat_template), folder, parts)
        else:
            deque(parts, maxlen=0)
        torch.distributed.barrier()

    def save(self, folder: Path) -> dict[str, str]:
        """Write the whole training state into `folder`; every rank takes part. Returns the checksums of the files that
        this one wrote."""
        return save_state(self.engine, folder, self.step)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, in whatever layout. Raises ValueError when the folder holds no state of this
        model."""
        self.step = load_state(self.engine, folder)

    def sleep(self) -> None:
        """Give the device's memory to whoever speaks next. On the CPU the memory is the same, and nothing moves."""
        if self.device.type == "cuda":
            leave_device(self.engine, self.spec.trainer)

    def wake(self) -> None:
        """Take back what `sleep` gave away."""
        if self.device.type == "cuda":
            return_to(self.device, self.engine, self.spec.trainer)

    def _forward(self, model: Callable[..., Any], row: MicroBatch) -> Any:
        token_ids_T, source_N, target_N = (
            torch.from_numpy(x.copy()).to(self.device) for x in (row.token_ids_T, row.source_N, row.target_N)
        )
        read = (source_N,) if self.spec.is_reward_model else (source_N, target_N)
        replayed = {}  # the reference is another policy: it keeps its own gates
        if row.experts_TLK is not None and model is not self.reference:
            replayed["experts_TLK"] = torch.from_numpy(row.experts_TLK.copy()).to(self.device)
        return model(token_ids_T, Layout(row.lengths, row.parents), *read, **replayed)

    def _clip_unsharded(self) -> Tensor:
        """Without ZeRO, DeepSpeed clips and does not tell the norm; so reduce and clip here, once."""
        if self.world_size > 1:
            self.engine.buffered_allreduce_fallback()
        return nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.spec.optimizer.max_grad_norm)

    def _gathered(self, tensors: list[Tensor]) -> AbstractContextManager[Any]:
        if self.spec.trainer.zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([t for t in tensors if isinstance(t, nn.Parameter)])


def _spread_experts(model: PreTrainedModel, trainer: TrainerConfig) -> None:
    """Over the ranks, where several share them."""
    if trainer.expert_parallel_size > 1:
        shard_experts(model, trainer.expert_parallel_size)
        if trainer.fp8:
            use_fp8_in_sharded_experts(model)
