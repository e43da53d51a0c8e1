"""Exceptions of the package: mistakes that the user can correct, and a requested stop."""


class UserError(ValueError):
    """A mistake in configuration, data or a model folder.

    The message names the place (dotted key or file:line), the value, the rule and the remedy.
    Rank 0 prints it without a traceback and the process ends with exit status 2.
    """


class AgreedUserError(UserError):
    """A UserError that is raised on every rank, so that only rank 0 prints it."""


class NotHere(UserError):
    """A path or name that does not exist on this machine; a plan for another machine may ignore it."""


def causes(fault: BaseException) -> list[BaseException]:
    """Return the exception and those that led to it, the last one first."""
    chain: list[BaseException] = []
    link: BaseException | None = fault
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def shorten(text: str) -> str:
    """Return the text, or its beginning and "..." where it has more than 80 characters, for a message."""
    return text if len(text) <= 80 else text[:77] + "..."


class StopRequested(Exception):
    """A first pass or sampling ended early because a stop was requested; finished work is stored."""
