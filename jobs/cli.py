"""The `alignyard` command: the list of its verbs. A verb's module is imported only when the verb is called."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version as package_version
from typing import Annotated, Any

from typer import Exit, Option, Typer
from typer._click.exceptions import ClickException
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from jobs.command import EXIT_CODES, exit_code, quieten

VERBS = {
    "run": ("run", "Run a recipe: every stage as a Ray job."),
    "submit": ("run", "Run one stage as a Ray job."),
    "list": ("runs", "List the runs."),
    "status": ("runs", "Show the stages of a run and their states."),
    "logs": ("runs", "Print the output of a run."),
    "watch": ("watch", "Watch a run until it ends."),
    "compare": ("compare", "Compare runs."),
    "rollouts": ("rollouts", "Show the samples of a run."),
    "explain": ("explain", "Show the figures that changed most in a step."),
    "stop": ("runs", "Stop a run."),
    "plan": ("plan", "Predict memory, layout and time of a recipe on a cluster."),
    "config": ("config", "Show a configuration and the origin of each value."),
    "sft": ("stage", "Fine-tune on conversations (supervised fine-tuning)."),
    "rm": ("stage", "Train a reward model on comparisons."),
    "dpo": ("stage", "Train a policy on comparisons (DPO)."),
    "grpo": ("stage", "Train with reinforcement learning (GRPO)."),
    "distill": ("stage", "Distil a student from teachers on its own text."),
    "sample": ("stage", "Collect verified conversations sampled from a model."),
    "eval": ("eval", "Evaluate a checkpoint on suites."),
    "chat": ("serve", "Talk with a checkpoint."),
    "serve": ("serve", "Serve a checkpoint by vLLM, with OpenAI's protocol."),
    "bench": ("bench", "Measure this machine."),
    "import-gguf": ("export", "Convert a GGUF file to a transformers checkpoint."),
    "export": ("export", "Write a checkpoint in another precision, FP8 included."),
    "gate": ("gate", "Show a gate's decision, or decide in its place."),
    "lineage": ("lineage", "Show the models and data that a run was made from."),
    "data": ("data", "Show data as a model will see it."),
    "preferences": ("preferences", "Build preference data for reward models."),
    "reward": ("reward", "List, create, check and use rewards."),
    "docs": ("docs", "Show a page of the documentation."),
    "doctor": ("doctor", "Check this machine and the installation."),
}
"""The module in `jobs.verbs` of each verb, and its line in `alignyard --help`."""

RESUMABLE = {"run", "sft", "rm", "dpo", "grpo", "distill", "sample", "preferences"}
"""Verbs that continue an interrupted run when the same command is given again."""


class LazyVerb(TyperCommand):
    """A verb that imports its module when it is called, completed or asked for its help."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, short_help=summary)
        self._module = module

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parses the verb's arguments with the command that its module defines."""
        command = get_command(import_module(f"jobs.verbs.{self._module}").app)
        if isinstance(command, TyperGroup):
            command = command.commands.get(str(self.name), command)
        for verb in (command, *(command.commands.values() if isinstance(command, TyperGroup) else ())):
            verb.epilog = EXIT_CODES
        return command.make_context(info_name, args, parent, **extra)


def _command() -> TyperGroup:
    app = Typer(rich_markup_mode=None, no_args_is_help=True, subcommand_metavar="VERB ...")
    settings = {"help_option_names": ["--help", "-h"], "max_content_width": 120}

    @app.callback(epilog=f"`alignyard VERB --help` explains a verb.\n\n{EXIT_CODES}", context_settings=settings)
    def alignyard(  # pyright: ignore[reportUnusedFunction]
        version: Annotated[
            bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """Turn a base language model into an aligned one: SFT, reward models, GRPO, and gates between them."""

    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for name, (module, summary) in VERBS.items():
        group.add_command(LazyVerb(name, module, summary))
    return group


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"alignyard {package_version('alignyard')}")
        raise Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code.

    Example:
        main(["run", "demo", "--dry-run"])
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    quieten()
    command = _command()
    if "_ALIGNYARD_COMPLETE" in os.environ:  # a shell asks for completions; prints them and exits
        command.main(arguments, prog_name="alignyard")
    return exit_code(lambda: _run(command, arguments), resumes=not RESUMABLE.isdisjoint(arguments[:1]))


def _run(command: TyperGroup, arguments: list[str]) -> int:
    try:
        with command.make_context("alignyard", arguments) as context:
            return command.invoke(context)
    except Exit as finished:  # after --help
        return finished.exit_code
    except ClickException as error:
        error.show()
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
