"""Names of settings in TRL, verl and OpenRLHF with ours beside them: for error messages, and for docs/coming_from.md.

`python -m configs.foreign docs/coming_from.md` writes the page.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TRL = """
model_name_or_path | model.path |
dtype | model.dtype | `auto` takes the checkpoint's
chat_template_path | model.chat_template | a file, or the name of a shipped template
eos_token | | found from the chat template, and written into the export
dataset_name | data.source, prompts.source | `{type: hub, path: NAME}`, or `{type: file, paths: [...]}`
dataset_text_field | data.messages | conversations alone are trained on, not plain text
max_length | data.max_length | a longer row is a bad row; nothing is cut
truncation_mode | | nothing is cut: a longer row is a bad row
packing | | always, without a setting; no sequence sees another
assistant_only_loss | | always: see docs/sft.md
completion_only_loss | | always: see docs/sft.md
per_device_train_batch_size | conversations_per_step, comparisons_per_step, prompts_per_step | of a step, over all ranks
gradient_accumulation_steps | trainer.micro_batch_tokens | a step is cut by tokens, with the same gradient
num_train_epochs | epochs, steps |
max_steps | steps |
lr_scheduler_type | optimizer.schedule | `{type: cosine, final_share: 0.1}`, constant, step_decay
warmup_steps | optimizer.schedule.warmup_steps |
warmup_ratio | optimizer.schedule.warmup_steps | in steps
adam_beta1 | optimizer.betas |
adam_beta2 | optimizer.betas |
bf16 | model.dtype | `bfloat16`
fp16 | model.dtype | `bfloat16` or `float32`; float16 is not trained
gradient_checkpointing | trainer.gradient_checkpointing |
deepspeed | trainer.zero_stage | also trainer.offload
use_peft | lora | `{rank: 16, alpha: 32}`
lora_r | lora.rank |
lora_alpha | lora.alpha |
lora_target_modules | lora.targets |
load_in_4bit | | not offered: weights are bfloat16 or float32
report_to | report_to | TensorBoard events, metrics.jsonl and report.html are always written
logging_steps | | every step is logged
run_name | | the option --output DIR, or `name` of a recipe
output_dir | | the option --output DIR; a recipe has `runs_dir` and `name`
overwrite_output_dir | | the option --fresh
resume_from_checkpoint | | the same command resumes
save_steps | checkpoint.every_steps |
save_total_limit | checkpoint.keep |
eval_steps | eval_every_steps, validation.every_steps |
eval_strategy | eval_every_steps, validation |
reward_funcs | rewards | `[{name: "trl:file.py:function"}]`: your functions run unchanged
reward_weights | rewards.weight |
multi_objective_aggregation | mixing |
num_generations | group_size |
generation_batch_size | prompts_per_step | counted in prompts, not in completions
steps_per_generation | updates_per_batch |
num_iterations | updates_per_batch | each completion is trained on once; the updates divide the batch
max_prompt_length | prompts.max_prompt_length |
max_completion_length | sampling.max_tokens |
temperature | sampling.temperature |
top_p | sampling.top_p |
top_k | sampling.top_k |
beta | objective.kl_coef, loss.beta |
epsilon | objective.clip_low | clip_high too, unless it differs
epsilon_high | objective.clip_high |
delta | objective.clip_dual |
loss_type | objective.preset, loss.kind | dapo, dr_grpo, gspo, cispo ...; docs/algorithm.md has what differs
scale_rewards | objective.normalize_std | `batch` is mixing: batch
importance_sampling_level | objective.ratio |
vllm_importance_sampling_cap | objective.importance_cap |
vllm_importance_sampling_correction | objective.importance_cap |
vllm_importance_sampling_mode | objective.importance_mode | also importance_level
off_policy_mask_threshold | objective.off_policy_mask |
use_bias_correction_kl | objective.kl | `unbiased`
entropy_coef | objective.entropy_coef |
mask_truncated_completions | overlong.mask |
sync_ref_model | objective.reference_every_steps |
ref_model_sync_steps | objective.reference_every_steps |
use_vllm | | always; rollout configures the engines
vllm_mode | placement | `colocated` or `separate`
vllm_tensor_parallel_size | rollout.tensor_parallel_size |
vllm_gpu_memory_utilization | rollout.kv_cache_gib | in GiB, or `auto`
vllm_max_model_length | rollout.max_model_len |
label_smoothing | loss.label_smoothing |
precompute_ref_log_probs | | always, once
center_rewards_coefficient | loss.center |
"""
_VERL = """
actor_rollout_ref.model.path | model.path |
actor_rollout_ref.model.enable_gradient_checkpointing | trainer.gradient_checkpointing |
actor_rollout_ref.model.lora_rank | lora.rank |
actor_rollout_ref.model.use_remove_padding | | always: rows have no padding
data.train_files | prompts.source | `{type: file, paths: [train.parquet]}`
data.val_files | validation | the suites of a gate: docs/gates.md
data.prompt_key | prompts.prompt |
data.train_batch_size | prompts_per_step |
data.max_prompt_length | prompts.max_prompt_length |
data.max_response_length | sampling.max_tokens |
data.filter_overlong_prompts | prompts.max_bad_share | longer prompts are bad rows, left out up to this share
data.truncation | | nothing is cut
actor_rollout_ref.actor.optim.lr | optimizer.learning_rate |
actor_rollout_ref.actor.optim.lr_warmup_steps | optimizer.schedule.warmup_steps |
actor_rollout_ref.actor.optim.lr_scheduler_type | optimizer.schedule |
actor_rollout_ref.actor.optim.weight_decay | optimizer.weight_decay |
actor_rollout_ref.actor.grad_clip | optimizer.max_grad_norm |
actor_rollout_ref.actor.ppo_mini_batch_size | updates_per_batch | the number of updates that divide a step's prompts
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu | trainer.micro_batch_tokens | in tokens
actor_rollout_ref.actor.ppo_max_token_len_per_gpu | trainer.micro_batch_tokens |
actor_rollout_ref.actor.use_dynamic_bsz | | always: rows are packed by tokens
actor_rollout_ref.actor.ppo_epochs | updates_per_batch | each completion is trained on once
actor_rollout_ref.actor.use_kl_loss | objective.kl_coef | above 0
actor_rollout_ref.actor.kl_loss_coef | objective.kl_coef |
actor_rollout_ref.actor.kl_loss_type | objective.kl | low_var_kl is k3
actor_rollout_ref.actor.clip_ratio | objective.clip_low | clip_high too, unless it differs
actor_rollout_ref.actor.clip_ratio_low | objective.clip_low |
actor_rollout_ref.actor.clip_ratio_high | objective.clip_high |
actor_rollout_ref.actor.clip_ratio_c | objective.clip_dual |
actor_rollout_ref.actor.loss_agg_mode | objective.aggregation |
actor_rollout_ref.actor.policy_loss.loss_mode | objective.preset |
actor_rollout_ref.actor.entropy_coeff | objective.entropy_coef |
actor_rollout_ref.actor.strategy | trainer.zero_stage | DeepSpeed's ZeRO in place of FSDP and Megatron
actor_rollout_ref.actor.fsdp_config.optimizer_offload | trainer.offload |
actor_rollout_ref.actor.fsdp_config.param_offload | trainer.offload |
actor_rollout_ref.actor.ulysses_sequence_parallel_size | | not offered: a sequence is on one rank
actor_rollout_ref.rollout.name | | vLLM, always
actor_rollout_ref.rollout.n | group_size |
actor_rollout_ref.rollout.temperature | sampling.temperature |
actor_rollout_ref.rollout.top_p | sampling.top_p |
actor_rollout_ref.rollout.top_k | sampling.top_k |
actor_rollout_ref.rollout.tensor_model_parallel_size | rollout.tensor_parallel_size |
actor_rollout_ref.rollout.gpu_memory_utilization | rollout.kv_cache_gib | in GiB, or `auto`
actor_rollout_ref.rollout.max_model_len | rollout.max_model_len |
actor_rollout_ref.rollout.max_num_seqs | rollout.max_num_seqs |
algorithm.adv_estimator | objective.baseline | `grpo` is the default; rloo is leave_one_out; there is no critic
algorithm.norm_adv_by_std_in_grpo | objective.normalize_std |
algorithm.use_kl_in_reward | objective.kl_coef | the divergence is a term of the loss
algorithm.kl_ctrl.kl_coef | objective.kl_coef |
algorithm.kl_ctrl.target_kl | objective.kl_target |
algorithm.filter_groups.enable | dynamic_sampling.max_rounds | above 1
reward.custom_reward_function.path | rewards | `[{name: "verl:FILE:FUNCTION"}]`; prompts.truth: reward_model
reward_model.enable | rewards | `[{name: reward_model, args: {path: CHECKPOINT}}]`
critic | | GRPO has no critic
trainer.total_epochs | steps |
trainer.total_training_steps | steps |
trainer.n_gpus_per_node | trainer.num_ranks | the cluster gives the GPUs; ranks and engines say how many
trainer.nnodes | trainer.num_ranks | over all machines; the run is started on a Ray cluster by --address
trainer.save_freq | checkpoint.every_steps |
trainer.test_freq | validation.every_steps |
trainer.logger | report_to | TensorBoard events, metrics.jsonl and report.html are always written
trainer.project_name | | `runs_dir` of a recipe
trainer.experiment_name | | `name` of a recipe, or --output DIR
trainer.default_local_dir | | --output DIR
trainer.resume_mode | | the same command resumes; --fresh begins anew
"""
_OPENRLHF = """
actor.model_name_or_path | model.path |
data.prompt_dataset | prompts.source |
data.dataset | data.source |
data.input_key | prompts.prompt, data.messages |
data.label_key | prompts.truth |
data.output_key | data.answer |
data.chosen_key | data.columns | `{chosen: NAME}`
data.rejected_key | data.columns | `{rejected: NAME}`
data.apply_chat_template | | always
data.input_template | model.chat_template |
data.max_len | data.max_length, rollout.max_model_len |
rollout.batch_size | prompts_per_step |
rollout.n_samples_per_prompt | group_size |
rollout.max_new_tokens | sampling.max_tokens |
rollout.temperature | sampling.temperature |
rollout.top_p | sampling.top_p |
train.batch_size | updates_per_batch, conversations_per_step, comparisons_per_step | in GRPO the number of updates
train.micro_batch_size | trainer.micro_batch_tokens | in tokens
train.max_tokens_per_gpu | trainer.micro_batch_tokens |
train.max_epochs | epochs, updates_per_batch |
train.num_episodes | steps |
train.colocate_all | placement | `colocated`, the default
train.seed | seed |
adam.lr | optimizer.learning_rate |
adam.betas | optimizer.betas |
adam.weight_decay | optimizer.weight_decay |
lr_scheduler | optimizer.schedule |
lr_warmup_ratio | optimizer.schedule.warmup_steps | in steps
max_norm | optimizer.max_grad_norm |
actor.eps_clip | objective.clip_low | clip_high too, unless it differs
actor.eps_clip_low_high | objective.clip_low | and objective.clip_high
actor.dual_clip | objective.clip_dual |
actor.policy_loss_type | objective.preset |
actor.loss_agg_mode | objective.aggregation |
actor.entropy_coef | objective.entropy_coef |
actor.aux_loss_coef | balance |
actor.gradient_checkpointing_enable | trainer.gradient_checkpointing |
actor.num_nodes | trainer.num_ranks |
actor.num_gpus_per_node | trainer.num_ranks |
algo.advantage.estimator | objective.baseline | group_norm is the default; rloo is leave_one_out
algo.advantage.no_std_norm | objective.normalize_std | `false`
algo.advantage.is_correction_threshold | objective.importance_cap |
algo.advantage.is_correction_level | objective.importance_level |
algo.advantage.is_correction_mode | objective.importance_mode |
algo.kl.init_coef | objective.kl_coef |
algo.kl.target | objective.kl_target |
algo.kl.estimator | objective.kl |
algo.kl.use_loss | | the divergence is always a term of the loss
algo.dynamic_filtering_enable | dynamic_sampling.max_rounds | above 1
reward.remote_url | rewards | `[{name: "openrlhf:file.py:reward_func"}]`, or the reward judge for an endpoint
reward.model_name_or_path | rewards | `[{name: reward_model, args: {path: CHECKPOINT}}]`
reward.overlong_buffer_len | overlong.shaping_tokens |
vllm.num_engines | rollout.num_engines |
vllm.tensor_parallel_size | rollout.tensor_parallel_size |
vllm.gpu_memory_utilization | rollout.kv_cache_gib | in GiB, or `auto`
ds.zero_stage | trainer.zero_stage |
ds.adam_offload | trainer.offload |
ds.packing_samples | | always
ds.lora.rank | lora.rank |
ds.lora.alpha | lora.alpha |
ds.lora.target_modules | lora.targets |
model.beta | loss.beta |
model.ipo_enable | loss.kind | `ipo`
model.label_smoothing | loss.label_smoothing |
ckpt.save_steps | checkpoint.every_steps |
ckpt.max_num | checkpoint.keep |
ckpt.output_dir | | --output DIR
ckpt.load_enable | | the same command resumes
logger.wandb.key | report_to | `[wandb]`; the key stands in WANDB_API_KEY
eval.steps | eval_every_steps, validation.every_steps |
pretrain | model.path | the name before 0.10
prompt_data | prompts.source | the name before 0.10
rollout_batch_size | prompts_per_step | the name before 0.10
train_batch_size | updates_per_batch, conversations_per_step, comparisons_per_step | the name before 0.10
micro_train_batch_size | trainer.micro_batch_tokens | the name before 0.10; in tokens
actor_learning_rate | optimizer.learning_rate | the name before 0.10
init_kl_coef | objective.kl_coef | the name before 0.10
prompt_max_len | prompts.max_prompt_length | the name before 0.10
generate_max_len | sampling.max_tokens | the name before 0.10
remote_rm_url | rewards | the name before 0.10
use_wandb | report_to | the name before 0.10; `[wandb]`, the key stands in WANDB_API_KEY
"""
_PAGE = """\
# Coming from TRL, verl or OpenRLHF

For people who have a configuration for one of these and look for our names. `alignyard` also answers each of them where
it meets it: `alignyard grpo my.yaml num_generations=8` says that it is `group_size` here. Reward functions written for
the three run unchanged ([add a reward](add_a_reward.md)), their data is read as it is ([SFT](sft.md),
[preferences](preferences.md)), and [algorithm](algorithm.md) lists where the same word computes something else.

A key with dots stands in nested blocks of YAML. Where several keys are given, each belongs to another type of stage.
This page is made by `python -m configs.foreign docs/coming_from.md`.
"""


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A setting of another library, `theirs`, with the keys that do its work here; none where nothing need be set."""

    library: str
    theirs: str
    ours: tuple[str, ...]
    note: str

    def advice(self, keys: list[str]) -> str:
        """Say what is ours, of the keys that the stage has if it has any of them."""
        names = [name for name in self.ours if any(f"{key}.".startswith(f"{name}.") for key in keys)] or self.ours
        here = f"is {' or '.join(names)} here" if names else "needs no key here"
        return f"{self.library}'s {self.theirs} {here}{f' ({self.note})' if self.note else ''}"


def _parse(library: str, table: str) -> Iterator[Counterpart]:
    for line in table.strip().splitlines():
        theirs, ours, note = (cell.strip() for cell in line.split("|"))
        yield Counterpart(library, theirs, tuple(name.strip() for name in ours.split(",") if name.strip()), note)


COUNTERPARTS = [*_parse("TRL", _TRL), *_parse("verl", _VERL), *_parse("OpenRLHF", _OPENRLHF)]


def counterpart(dotted_key: str) -> Counterpart | None:
    """Return the setting of another library that a key names: whole, by its last parts, or by its last part alone."""
    last = dotted_key.rpartition(".")[2]
    for name in dict.fromkeys((dotted_key, last)):
        for setting in COUNTERPARTS:
            if f".{setting.theirs}".endswith(f".{name}") or f".{name}".endswith(f".{setting.theirs}"):
                return setting
    return None


def page() -> str:
    """Return docs/coming_from.md."""
    parts = [_PAGE]
    for library, release in (("TRL", "1.16"), ("verl", "0.9"), ("OpenRLHF", "0.11")):
        rows = [setting for setting in COUNTERPARTS if setting.library == library]
        parts.append(f"\n## {library} {release}\n\n| {library} | here | |\n|---|---|---|\n")
        for setting in rows:
            ours = ", ".join(f"`{name}`" for name in setting.ours) or "nothing to set"
            parts.append(f"| `{setting.theirs}` | {ours} | {setting.note} |\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
