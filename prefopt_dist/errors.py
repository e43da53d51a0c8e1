"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in configuration, data or a model folder.

    The message names the place (dotted key or file:line), the value, the rule and the remedy.
    Rank 0 prints it without a traceback and the process ends with exit status 2.
    """


class AgreedUserError(UserError):
    """A UserError that every rank has: rank 0 tells it for all."""


class NotHere(UserError):
    """What the user names is not on this machine, which a plan for another one need not mind."""


def shortened(text: str) -> str:
    """What a message shows of a value or a key: its beginning."""
    return text if len(text) <= 80 else text[:77] + "..."


class StopRequested(Exception):
    """The pass was asked to stop; what it scored is in the store."""
