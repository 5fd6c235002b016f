"""Errors that end a run in a state that it can resume from."""


class RunStopped(Exception):
    """The run stopped itself: a weight sync was not proven, rewards kept failing, a call timed out. The message gives
    the cause and the remedy."""


class RankLost(RunStopped):
    """The process of a training rank ended; its stage can start again from its newest checkpoint."""


class DecisionNeeded(Exception):
    """A gate with `on_undecided: ask` could not decide. The message gives the open rules and the command to decide."""
