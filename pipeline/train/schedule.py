"""Learning-rate schedules as functions of the step, so that a resumed run needs no scheduler state."""

import math

from configs.train import ConstantSchedule, CosineSchedule, Schedule


def learning_rate(schedule: Schedule, *, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1 to total_steps.

    Warm-up is linear and reaches the peak at step `warmup_steps`. Cosine falls from there to final_share * peak at
    total_steps. Step decay multiplies by its factor when step / total_steps passes a milestone.
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if isinstance(schedule, ConstantSchedule):
        return peak
    if isinstance(schedule, CosineSchedule):
        progress = (step - schedule.warmup_steps) / max(total_steps - schedule.warmup_steps, 1)
        share = schedule.final_share + (1 - schedule.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        return peak * share
    return peak * schedule.factor ** sum(step / total_steps > share for share in schedule.milestones)
