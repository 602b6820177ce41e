"""Errors a user can act on: what went wrong, and what to do next."""

import difflib
from collections.abc import Iterable


class DopFastError(Exception):
    """A known failure: `message` says what, `hint` what to run or change next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(DopFastError):
    """A setting is unknown, of the wrong type or out of range: a usage error."""


class DataError(DopFastError):
    """Images, classes or labels are missing, unreadable or too few."""


class ModelError(DopFastError):
    """A network, a layer or its weights do not fit."""


class StoreError(DopFastError):
    """A store, mask or run is missing, unfinished, foreign or already there."""


class RankError(DopFastError):
    """One of a job's ranks was lost, or disagrees with the others."""


NAMED = 20  # words that a hint names at most


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that is most like this one, else at all, if there is any."""
    names = list(known)
    near = difflib.get_close_matches(word, names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"one of: {', '.join(names[:NAMED])}{more}" if names else ""
