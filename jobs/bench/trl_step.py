"""Program: time GRPO steps of TRL on a checkpoint and prompts. `jobs.bench.versus_trl` runs it in TRL's environment.

    python trl_step.py CHECKPOINT PROMPTS STEPS SETTINGS

SETTINGS is a JSON object of arguments of `trl.GRPOConfig`. The last line of the output is a JSON list of the seconds of
each step after the first, which warms up.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports, reportUnknownVariableType]


class StepTimes(TrainerCallback):
    """Seconds between the beginning and the end of each optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def even_length(completions: list[str], **columns: Any) -> list[float]:
    """Reward completions of an even number of characters, so that groups have a gradient."""
    return [float(len(completion) % 2 == 0) for completion in completions]


def main(checkpoint: str, prompts_file: str, steps: int, settings: dict[str, Any]) -> None:
    """Train `steps` + 1 steps and print the seconds of all but the first."""
    prompts = [json.loads(line)["prompt"] for line in Path(prompts_file).read_text(encoding="utf-8").splitlines()]
    times = StepTimes()
    with TemporaryDirectory() as output:
        trainer: Any = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            reward_funcs=even_length,
            args=GRPOConfig(
                output_dir=output,
                max_steps=steps + 1,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1000,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[times],
        )
        trainer.train()
    print(json.dumps(times.seconds[1:]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
