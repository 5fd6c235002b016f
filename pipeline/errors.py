"""Why a run stopped itself."""


class RunStopped(Exception):
    """The run found a reason not to go on (a sync that could not be proven, rewards that can't be trusted, a call that
    timed out) and left a folder it can be resumed from. The message says what happened and what to do."""
