"""The `alignyard` command.

A verb imports what it needs when it runs: `alignyard --help` must not wait for torch.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name

from rich.table import Table

from jobs.command import EXIT_CODES, OUT, Verbs, add_overrides, add_verb, exit_code, quieten
from jobs.verbs.gate import add_gate
from jobs.verbs.lineage import add_lineage
from jobs.verbs.plan import add_plan
from jobs.verbs.preferences import add_preferences
from jobs.verbs.reward import add_reward
from jobs.verbs.run import add_run
from jobs.verbs.watch import add_watch

CONFIG = """\
Prints the whole configuration as YAML, defaults included, each value with its origin (a file, an override, or the
default) as a comment. The output is itself a configuration that runs the same.

examples:
  alignyard config demo
  alignyard config demo stages.reason.steps=300 > longer.yaml
"""
STAGE = """\
Runs one stage of type `{stage}` into the folder of a run. A run that was stopped or killed goes on where it was when
the same command is given again. docs/configs.md lists every key.

examples:
  alignyard {stage} my_{stage}.yaml
  alignyard {stage} my_{stage}.yaml optimizer.learning_rate=1e-5 --output runs/slow
"""
EVAL = """\
Evaluates the checkpoint a configuration of type `eval` names, or with --suite any checkpoint by such a configuration,
and prints the figures.

examples:
  alignyard eval my_eval.yaml --json figures.json
  alignyard eval runs/demo/reason/hf --suite my_eval.yaml seed=1
"""
BENCH = """\
Measures this machine: a whole GRPO step (generate, judge, reference, update, sync) or a weight sync with its proof, on
a random mixture-of-experts model of 25 million parameters; math answers judged beside math-verify alone; programs run
in the sandbox beside the bare ones; what engine and trainer disagree on, with and without routing replay.
Of our parts of a model, what they cost beside the plain ones: experts (moe), log-probabilities over a large vocabulary
in time and memory (logprobs), and products in FP8 with their error (fp8). `demo` runs the demo at several seeds.

examples:
  alignyard bench grpo-step
  alignyard bench sync --steps 10 --json sync.json
  alignyard bench rewards
  alignyard bench sandbox
  alignyard bench replay
  alignyard bench moe
  alignyard bench demo --steps 5
"""
GGUF = """\
Dequantises a Llama GGUF file into a folder that transformers and vLLM load, tokenizer and chat template included. Needs
the extra `gguf`.

example:
  alignyard import-gguf SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
"""
EXPORT_FP8 = """\
Writes a checkpoint in the FP8 form in which DeepSeek-V3 is deployed, and which vLLM loads on GPUs: the projections of
attention, MLPs and experts in E4M3 with a scale for each 128 x 128, all else as it is.

example:
  alignyard export-fp8 runs/demo/reason/hf models/reason-fp8
"""
DOCTOR = """\
Lists devices, cores, memory and disk, the packages alignyard is pinned to, and the programs it calls; what is missing
stands with what cannot be done without it. Ends with 1 if something required is missing.

example:
  alignyard doctor
"""

BENCHES = {
    "grpo-step": "jobs.bench.grpo:grpo_step",
    "sync": "jobs.bench.grpo:sync",
    "rewards": "jobs.bench.rewards:rewards",
    "sandbox": "jobs.bench.sandbox:sandbox",
    "moe": "jobs.bench.models:moe",
    "logprobs": "jobs.bench.models:logprobs",
    "fp8": "jobs.bench.models:fp8",
    "replay": "jobs.bench.replay:replay",
    "demo": "jobs.bench.demo:demo",
}
"""Where each benchmark is, so that only the one that runs is imported: what is loaded moves what is measured."""

STAGE_VERBS = {
    "sft": "supervised fine-tuning on conversations",
    "rm": "a reward model, of comparisons",
    "grpo": "reinforcement by GRPO",
    "sample": "conversations of a model's own verified answers",
}
"""The stages that are started alike, in the foreground."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    args = parse(argv)
    quieten()
    return exit_code(lambda: args.verb(args), resumes=args.resumes)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; an override may also stand after an option, where argparse alone would not take it."""
    parser = build_parser()
    args, strays = parser.parse_known_args(argv)
    for stray in strays:
        if stray.startswith("-") or "=" not in stray or "overrides" not in args:
            parser.error(f"unrecognized argument: {stray}")
    if strays:
        args.overrides += strays
    return args


def build_parser() -> argparse.ArgumentParser:
    """All verbs."""
    parser = argparse.ArgumentParser(
        prog="alignyard",
        description="From a base language model to an aligned one: SFT, reward models, GRPO, and gates between.",
        epilog=f"alignyard VERB --help explains a verb.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add_run(verbs)
    add_watch(verbs)
    add_plan(verbs)
    _add_config(verbs)
    _add_stages(verbs)
    _add_eval(verbs)
    _add_bench(verbs)
    _add_import_gguf(verbs)
    _add_export_fp8(verbs)
    add_gate(verbs)
    add_lineage(verbs)
    add_preferences(verbs)
    add_reward(verbs, EXIT_CODES)
    add_verb(verbs, "doctor", _doctor, "what this machine has, and what is missing for what", DOCTOR)
    return parser


def _add_config(verbs: Verbs) -> None:
    parser = add_verb(verbs, "config", _config, "show what would run, and where each value comes from", CONFIG)
    parser.add_argument("file", metavar="FILE", help="a recipe or the configuration of one stage")
    add_overrides(parser)


def _add_stages(verbs: Verbs) -> None:
    for stage, summary in STAGE_VERBS.items():
        parser = add_verb(verbs, stage, _stage, summary, STAGE.format(stage=stage), resumes=True)
        parser.set_defaults(stage=stage)
        parser.add_argument("file", metavar="CONFIG", help=f"a YAML file with `type: {stage}` and its keys at the root")
        add_overrides(parser)
        parser.add_argument(
            "--output", metavar="DIR", type=Path, help="folder of the run (default: runs/<CONFIG's name>)"
        )


def _add_eval(verbs: Verbs) -> None:
    parser = add_verb(verbs, "eval", _eval, "evaluate a checkpoint on suites", EVAL)
    parser.add_argument("target", metavar="CONFIG|CHECKPOINT", help="a YAML file, or with --suite a checkpoint")
    add_overrides(parser)
    parser.add_argument("--suite", metavar="FILE", help="the YAML file to evaluate CHECKPOINT by")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: below runs/)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")


def _add_bench(verbs: Verbs) -> None:
    parser = add_verb(verbs, "bench", _bench, "measure this machine", BENCH)
    parser.add_argument("what", choices=list(BENCHES), help="what to measure")
    parser.add_argument("--steps", type=int, default=3, help="how often to measure (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")


def _add_import_gguf(verbs: Verbs) -> None:
    parser = add_verb(verbs, "import-gguf", _import_gguf, "make a transformers checkpoint of a GGUF file", GGUF)
    parser.add_argument("file", metavar="FILE", type=Path, help="the GGUF file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")


def _add_export_fp8(verbs: Verbs) -> None:
    parser = add_verb(verbs, "export-fp8", _export_fp8, "write a checkpoint in DeepSeek's FP8 form", EXPORT_FP8)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a folder that transformers loads")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")


def _stage(args: argparse.Namespace) -> int:
    from configs.load import load_config
    from configs.stages import STAGES

    config = load_config(args.file, args.overrides, STAGES[args.stage]).config
    from pipeline.run.stage import run_stage

    run_stage(config, args.output or Path("runs") / Path(args.file).stem)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from configs.evaluation import EvalConfig
    from configs.load import load_config

    file, overrides, name = args.target, args.overrides, Path(args.target).stem
    if args.suite:
        # Of a folder that a running stage replaces, what it is now. Every checkpoint ends in the same few folder names:
        # three of them tell it from others.
        checkpoint = str(Path(args.target).resolve()) if Path(args.target).is_dir() else args.target
        file, name = args.suite, "-".join([Path(args.suite).stem, *Path(checkpoint).resolve().parts[1:][-3:]])
        overrides = [f"model.path={json.dumps(checkpoint)}", *overrides]
    elif Path(args.target).is_dir():
        raise ValueError(f"{args.target} is a folder: say by --suite FILE what to evaluate it on")
    config = load_config(file, overrides, EvalConfig).config
    from pipeline.run.stage import run_stage

    write_figures(run_stage(config, args.output or Path("runs") / name), args.json)
    return 0


def _config(args: argparse.Namespace) -> int:
    from configs.load import find_config, load_config, read_yaml
    from configs.stages import STAGES, Recipe
    from jobs.verbs.origins import annotated_yaml

    model = STAGES.get(str(read_yaml(find_config(args.file)).get("type")), Recipe)
    for line in annotated_yaml(load_config(args.file, args.overrides, model)):
        OUT.print(line, soft_wrap=True)
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: measure at least one")
    figures: dict[str, float] = resolve_name(BENCHES[args.what])(args.steps)
    table = Table("figure", "value", title=args.what)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    OUT.print(table)
    write_figures(figures, args.json)
    return 0


def _import_gguf(args: argparse.Namespace) -> int:
    from pipeline.weights.gguf import import_gguf

    import_gguf(args.file, args.out)
    return 0


def _export_fp8(args: argparse.Namespace) -> int:
    from pipeline.weights.fp8_export import export_fp8

    count = export_fp8(args.checkpoint, args.out)
    OUT.print(f"{args.out}: {count} weights in FP8", soft_wrap=True)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from jobs.verbs.doctor import doctor

    return doctor(OUT)


def write_figures(figures: Mapping[str, float], file: Path | None) -> None:
    """Writes the figures as JSON, whole or not at all."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(main())
