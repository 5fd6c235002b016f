"""Why a run stopped itself."""


class RunStopped(Exception):
    """The run found a reason not to go on (a sync that could not be proven, rewards that can't be trusted, a call that
    timed out) and left a folder it can be resumed from. The message says what happened and what to do."""


class DecisionNeeded(Exception):
    """A gate could not decide, and was told to ask. The message says what is undecided and how to answer."""
