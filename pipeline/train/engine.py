"""The training engine of one rank: `forward_backward` and `optim_step` on DeepSpeed.

It knows micro-batches and a loss, but no algorithm. Losses are divided by a denominator that is counted over the whole
batch, and gradients are summed over micro-batches and ranks, so the split of a batch can't change them. DeepSpeed's
mean over ranks is undone by multiplying the loss by the number of ranks.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.trees import Floats, MicroBatch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import CHUNK_TOKENS, LogprobModel, TokenSampling
from pipeline.models.lora import merge_adapters, without_adapters
from pipeline.models.mtp import mtp_as_layers
from pipeline.models.rounding import perturbed_rounding
from pipeline.models.tokenizer import load_tokenizer
from pipeline.train.balancer import Balancer
from pipeline.train.build import build_engine, build_frozen, join_ranks, prepare_torch
from pipeline.train.expert_parallel import as_fused, expert_group
from pipeline.train.losses import batch_loss, metric_count
from pipeline.train.memory import StepMemory
from pipeline.train.schedule import learning_rate
from pipeline.train.sender import WeightSender
from pipeline.train.sleep import Residence
from pipeline.train.spec import BatchSums, FrozenModel, TrainSpec
from pipeline.train.state import StateWriter, copy_weights, gathered, load_state, trained_tensors
from pipeline.weights.adapters import write_adapters
from pipeline.weights.fill import layers
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import save_hf
from pipeline.weights.reward_model import save_score_model
from rollout.device import DeviceError, DeviceState, Ledger, Move, needs
from rollout.types import Routes, Transport


class TrainEngine:
    """One rank's model, optimizer state and gradients. `to` moves it off its device and back.

    Example:

        engine = TrainEngine(spec)
        sums = engine.forward_backward(rows, denominator)
        figures = engine.optim_step()
    """

    def __init__(self, spec: TrainSpec) -> None:
        self.spec = spec
        self.device = prepare_torch(spec.trainer.deterministic)
        self.memory = StepMemory(self.device)  # before the model, whose memory it measures
        join_ranks(self.device)
        self.world_size = torch.distributed.get_world_size()
        self._model, self.engine = build_engine(spec, self.device)
        model = self.engine.module
        self._mtp = model.mtp if isinstance(model, LogprobModel) else None
        self.balancer = Balancer(model.routers, spec.balance, self.device, expert_group(self._model))
        frozen = FrozenModel(spec.reference or spec.model, spec.dtype)
        self.reference = build_frozen(frozen, spec, self.device) if spec.with_reference and not spec.lora else None
        self.step = 0
        self.name, self.state = f"rank {torch.distributed.get_rank()}", DeviceState.AWAKE
        self._has_gradient = False
        self._vocab_size = 0 if spec.is_reward_model else int(self._model.config.get_text_config().vocab_size)
        ledger = Ledger.of_environment(self.name)
        self._residence = Residence(self.engine, self.reference, self.device, ledger)
        self._writer = StateWriter()
        self.sender = WeightSender(self._model, spec.trainer, self.device, ledger)

    @needs(*DeviceState)
    def to(self, state: DeviceState) -> Move:
        """Keep on the device the memory of `state` only; the rest waits in the host's memory.

        Raises DeviceError between `forward_backward` and `optim_step`, since the gradient would be lost.
        """
        if self._has_gradient:
            raise DeviceError(f"{self.name} holds a gradient that `optim_step` has not used, so it can't move")
        move = self._residence.to(state)
        self.state = state
        return move

    @needs(DeviceState.AWAKE)
    def forward_backward(self, batch: list[MicroBatch], denominator: float) -> BatchSums:
        """Accumulate the gradient of the loss over `batch`, divided by `denominator`, which is counted over all
        micro-batches and ranks."""
        self._has_gradient = True
        self.engine.train()
        total = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        mtp_weight = self.spec.mtp.weight if self.spec.mtp else 0.0
        self.memory.begin(batch)
        self.balancer.begin_batch(batch)
        for row in batch:
            self.balancer.begin_row(row)
            output = self._forward(self.engine, row)
            loss, row_sums, row_maxima = batch_loss(self.spec.objective, row, output, denominator, mtp_weight)
            self.engine.backward(loss * self.world_size)
            total += loss.detach()
            for name, value in row_sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in row_maxima.items():
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        count = sum(metric_count(self.spec.objective, row) for row in batch)
        floats = ({name: value.item() for name, value in tensors.items()} for tensors in (sums, maxima))
        return BatchSums(count, total.item(), *floats)

    @needs(DeviceState.AWAKE)
    def optim_step(self) -> dict[str, float]:
        """Clip the gradient, update the weights and clear the gradient.

        Returns the learning rate, the gradient's global norm before clipping, the balance of the experts' load, and the
        rank's peak memory.
        """
        self.step += 1
        config = self.spec.optimizer
        rate = learning_rate(
            config.schedule, peak=config.learning_rate, step=self.step, total_steps=self.spec.total_steps
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        unsharded = self.spec.trainer.zero_stage == 0
        norm = _clip_unsharded(self.engine, config.max_grad_norm) if unsharded else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        balance = self.balancer.step()
        self._has_gradient = False
        self._residence.record()
        return {"train/learning_rate": rate, "train/grad_norm": float(norm)} | balance | self.memory.figures()

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def logprobs(self, batch: list[MicroBatch]) -> list[Floats]:
        """Compute the policy's log-probabilities of the trained tokens, float32 [N] for each row."""
        return self._logprobs(self.engine, batch)

    @needs(DeviceState.AWAKE)
    def reference_logprobs(self, batch: list[MicroBatch]) -> list[Floats]:
        """Compute the frozen reference's log-probabilities of the trained tokens, float32 [N] for each row."""
        rows = [replace(row, experts_TLK=None) for row in batch]  # it is another policy and keeps its own routes
        if self.spec.lora:
            with without_adapters(self._model):
                return self._logprobs(self.engine, rows)
        assert self.reference is not None, "no reference was loaded"
        return self._logprobs(self.reference, rows)

    @needs(DeviceState.AWAKE)
    def refresh_reference(self) -> None:
        """Copy the policy's weights into the reference, in place; every rank takes part."""
        assert self.reference is not None, "no reference was loaded"
        reference = getattr(self.reference, "module", self.reference)  # under ZeRO-3 it is a DeepSpeed engine
        copy_weights(self.engine.module, reference, zero_stage=self.spec.trainer.zero_stage)

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def perturbed_logprobs(self, batch: list[MicroBatch]) -> list[Floats]:
        """Compute log-probabilities with perturbed rounding (pipeline.models.rounding)."""
        with perturbed_rounding(self._model):
            return self.logprobs(batch)

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def logprobs_and_experts(self, batch: list[MicroBatch]) -> list[tuple[Floats, Routes]]:
        """Compute the policy's `logprobs`, and record the experts of each token of the row."""
        return [(self.logprobs([row])[0], self.engine.module.routers.chosen_TLK.short().cpu().numpy()) for row in batch]

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def scores(self, batch: list[MicroBatch]) -> list[Floats]:
        """Compute a reward model's score of every answer, float32 [N] for each row."""
        return self.logprobs(batch)

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def evaluate(self, batch: list[MicroBatch]) -> BatchSums:
        """Sum the negative log-likelihood of the trained tokens, without a gradient."""
        nll = -sum(float(values_N.sum(dtype=np.float64)) for values_N in self.logprobs(batch))
        return BatchSums(sum(len(row.target_N) for row in batch), nll, {"eval/nll_mean": nll}, {})

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def layer_weights(self, *, with_mtp: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield the weights by checkpoint name, one layer at a time.

        Tensors are valid until the next layer; under ZeRO-3 every rank takes part in gathering it. `with_mtp` includes
        MTP modules, which rollout engines don't load.
        """
        tied = set(self._model.all_tied_weights_keys)
        with mtp_as_layers(self._mtp if with_mtp else None, self._model):
            for layer in layers(self._model):
                with gathered(layer, zero_stage=self.spec.trainer.zero_stage):
                    tensors = {name: tensor.detach() for name, tensor in layer.items() if name not in tied}
                    tensors = as_fused(self._model, merge_adapters(self._model, tensors))
                    yield checkpoint_tensors(self._model, tensors)

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def begin_sync(self, bucket_mib: float, engine_devices: Collection[str], transport: Transport | None) -> None:
        """Prepare `sender` to send the weights (see WeightSender)."""
        self.sender.begin(bucket_mib, engine_devices, transport)

    @needs(DeviceState.AWAKE, DeviceState.WEIGHTS)
    def save_hf(self, folder: Path) -> None:
        """Write a `transformers` checkpoint, with its adapters in `adapter`: all ranks gather, the first writes."""
        parts, extend = self.layer_weights(with_mtp=True), None
        if self.spec.lora:
            adapters = trained_tensors(self._model, zero_stage=self.spec.trainer.zero_stage)
            extend = partial(write_adapters, self._model, adapters, self.spec.lora, self.spec.model)
        if torch.distributed.get_rank() == 0:
            write = save_score_model if self.spec.is_reward_model else save_hf
            write(self._model, load_tokenizer(self.spec.model, self.spec.chat_template), folder, parts, extend)
        else:
            deque(parts, maxlen=0)
        torch.distributed.barrier()

    @needs(DeviceState.AWAKE)
    def begin_save(self, folder: Path) -> None:
        """Copy this rank's part of the training state to the host, to be written into `folder` meanwhile."""
        self._writer.begin(self.engine, folder, self.step)

    @needs(*DeviceState)
    def end_save(self, patience: float | None) -> dict[str, str] | None:
        """Return the checksums of what `begin_save` writes; None if it takes longer than `patience` seconds."""
        return self._writer.result(patience)

    @needs(DeviceState.AWAKE)
    def load(self, folder: Path) -> None:
        """Resume from a state of all ranks, of any layout. Raises ValueError for another model's state."""
        self.step = load_state(self.engine, folder)
        self._residence.record()

    def _logprobs(self, model: Callable[..., Any], batch: list[MicroBatch]) -> list[Floats]:
        with torch.no_grad():
            return [self._forward(model, row).cpu().numpy() for row in batch]

    def _forward(self, model: Callable[..., Any], row: MicroBatch, **options: Any) -> Any:
        """Run `model` on `row`; `options` add to its arguments, or replace them."""
        token_ids_T, source_N, target_N = (
            torch.from_numpy(x.copy()).to(self.device) for x in (row.token_ids_T, row.source_N, row.target_N)
        )
        inputs: dict[str, Any] = {} if self.spec.is_reward_model else {"target_N": target_N}
        inputs |= _replayed(row, self.device)
        layout = Layout(row.lengths, row.parents, row.repeated)
        with self._residence.working("logits", 4 * min(len(row.target_N), CHUNK_TOKENS) * self._vocab_size):
            return model(token_ids_T, layout, source_N, **inputs | options)


def _replayed(row: MicroBatch, device: torch.device) -> dict[str, Any]:
    """Return arguments of the policy's forward pass that repeat what the rollout did."""
    options: dict[str, Any] = {}
    if row.experts_TLK is not None:
        options["experts_TLK"] = torch.from_numpy(row.experts_TLK.copy()).to(device)
    sampling = (row.columns.get("temperature"), None if row.kept is None else row.kept.padded())
    if any(column is not None for column in sampling):
        tensors = (None if x is None else torch.from_numpy(x.copy()).to(device) for x in sampling)
        options["sampling"] = TokenSampling(*tensors)
    return options


def _clip_unsharded(engine: Any, max_grad_norm: float) -> Tensor:
    """Reduce and clip without ZeRO, because DeepSpeed clips without returning the norm."""
    if torch.distributed.get_world_size() > 1:
        engine.buffered_allreduce_fallback()
    return nn.utils.clip_grad_norm_(engine.module.parameters(), max_grad_norm)
