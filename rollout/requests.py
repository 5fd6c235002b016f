"""Refusals of requests that an engine can't serve."""

from configs.sampling import SamplingConfig


def refuse_equal_completions(sampling: SamplingConfig, num_completions: int) -> None:
    """Raise ValueError for several completions of a prompt at temperature 0."""
    if sampling.temperature == 0 and num_completions > 1:
        raise ValueError(
            f"num_completions={num_completions} at sampling.temperature=0 would sample the same completion again; "
            "ask for 1, or raise the temperature"
        )


def refuse_prompts(prompts: list[list[int]], max_tokens: int, max_model_len: int) -> None:
    """Raise ValueError for an empty prompt, or one without room for `max_tokens`."""
    longest = max_model_len - max_tokens
    for index, prompt_ids in enumerate(prompts):
        if not 1 <= len(prompt_ids) <= longest:
            raise ValueError(
                f"prompt {index} has {len(prompt_ids)} tokens, allowed are 1 to {longest} (rollout.max_model_len="
                f"{max_model_len} less sampling.max_tokens={max_tokens}): raise max_model_len or shorten the prompt"
            )


def refuse_starts(sequences: list[list[int]], starts: list[int], max_model_len: int) -> None:
    """Raise ValueError for a sequence that is too long to be scored, or a start outside of it."""
    for index, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        if not 1 <= start < len(sequence) < max_model_len:
            raise ValueError(
                f"sequence {index} has {len(sequence)} tokens and is scored from {start} on: it must be shorter than "
                f"rollout.max_model_len={max_model_len}, and the start within it, but not at 0"
            )
