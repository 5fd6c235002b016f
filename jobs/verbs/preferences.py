"""Preference data on the command line: `alignyard preferences build`."""

import argparse
from pathlib import Path

from jobs.command import Verbs, add_overrides, add_verb

PREFERENCES = """\
Makes the comparisons that reward models learn from. docs/preferences.md says how.

example:
  alignyard preferences build my_preferences.yaml
"""
BUILD = """\
Samples answers, judges them and pairs the best with the worst, reads comparisons that others have made, filters all of
them, and writes the data set <output>/data. A run that was stopped or killed goes on where it was when the same command
is given again. docs/configs.md lists every key.

examples:
  alignyard preferences build my_preferences.yaml
  alignyard preferences build my_preferences.yaml filters.min_margin=0.5 --output runs/wide
"""


def add_preferences(verbs: Verbs) -> None:
    """Adds `preferences` and its own verb to the command's."""
    preferences = add_verb(verbs, "preferences", _build, "preference data for reward models", PREFERENCES)
    below = preferences.add_subparsers(metavar="VERB", required=True)
    build = add_verb(below, "build", _build, "sample, judge, read and filter comparisons", BUILD, resumes=True)
    build.add_argument("file", metavar="CONFIG", help="a YAML file with `type: preferences` and its keys at the root")
    add_overrides(build)
    build.add_argument("--output", metavar="DIR", type=Path, help="folder of the run (default: runs/<CONFIG's name>)")


def _build(args: argparse.Namespace) -> int:
    from configs.load import load_config
    from configs.preferences import PreferencesConfig

    config = load_config(args.file, args.overrides, PreferencesConfig).config
    from pipeline.run.stage import run_stage

    run_stage(config, args.output or Path("runs") / Path(args.file).stem)
    return 0
