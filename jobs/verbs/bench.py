"""`alignyard bench NAME`: measures this machine. A benchmark is imported only when it runs."""

from pkgutil import resolve_name
from typing import Annotated

from typer import Argument, Option

from jobs.command import OUT, JsonFile, plain_table, verb_app, write_json

app = verb_app()
BENCHES = {
    "grpo-step": "jobs.bench.grpo:grpo_step",
    "versus-trl": "jobs.bench.versus_trl:versus_trl",
    "growth": "jobs.bench.growth:growth",
    "sync": "jobs.bench.grpo:sync_step",
    "async": "jobs.bench.asynchronous:asynchronous",
    "simulation": "jobs.bench.simulation:simulation",
    "data-plane": "jobs.bench.data_plane:data_plane",
    "rewards": "jobs.bench.rewards:rewards",
    "sandbox": "jobs.bench.sandbox:sandbox_cost",
    "moe": "jobs.bench.models:moe",
    "logprobs": "jobs.bench.models:logprobs",
    "fp8": "jobs.bench.models:fp8",
    "replay": "jobs.bench.replay:replay",
    "demo": "jobs.bench.demo:demo",
    "online-offline": "jobs.bench.online_offline:online_offline",
    "ablations": "jobs.bench.ablations:ablations",
}
"""Each benchmark's function, which takes a number of repeats and returns figures. It is named as text, so that only the
benchmark that runs is imported: a loaded module would change the measurement of another."""


@app.command()
def bench(
    name: Annotated[
        str, Argument(metavar="|".join(BENCHES), help="The benchmark.", autocompletion=lambda: list(BENCHES))
    ],
    steps: Annotated[int, Option(help="Number of measurements.")] = 3,
    json_file: JsonFile = None,
) -> int:
    """Measure this machine with one of the benchmarks.

    \b
    grpo-step      a GRPO step (generate, judge, reference, update, sync) of a random 25M-parameter mixture of experts
    versus-trl     the same step of ours and of TRL's, in turns
    growth         a step of 1, 2 and 4 times the prompts, completions, tokens, layers, experts and engines
    sync           a weight sync of that model with its proof
    async          GRPO with and without a lag, a core for the engine and one for the rank, at as many seeds as --steps
    simulation     GRPO with and without a lag on 8 to 1,024 GPUs, simulated
    data-plane     a million sampled tokens on their way from engines to ranks
    rewards        math answers judged, beside math-verify alone
    sandbox        programs run in the sandbox, beside the same programs without it
    moe            forward and backward of experts, beside transformers' own
    logprobs       time and memory of log-probabilities over a large vocabulary
    fp8            cost and error of products in FP8
    replay         mismatch of engine and trainer, with and without routing replay
    demo           the demo recipe, at as many seeds as --steps
    online-offline GRPO on a reward model beside DPO on its preferences, at as many seeds as --steps
    ablations      forms of GRPO that differ in one setting, at as many seeds as --steps

    \b
    Examples:
      alignyard bench grpo-step
      alignyard bench sync --steps 10 --json sync.json
    """
    from configs.base import neighbour

    if name not in BENCHES:
        raise ValueError(f"bench {name}: no such benchmark; {neighbour(name, list(BENCHES))}")
    if steps < 1:
        raise ValueError(f"--steps {steps}: measure at least once")
    figures: dict[str, float] = resolve_name(BENCHES[name])(steps)
    table = plain_table("figure", "value")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:.4g}")
    OUT.print(table)
    write_json(figures, json_file)
    return 0
