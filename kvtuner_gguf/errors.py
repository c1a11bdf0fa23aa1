"""The errors that a user can meet. Anything else that is raised is a bug of ours."""

from __future__ import annotations

from .printable import printable

MOST_CHARACTERS = 4000  # of a message: paths, and what a tool or a library said


class KvtunerError(Exception):
    """Base of all errors whose message is written for the user: one line, with names and texts of others made
    printable."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, MOST_CHARACTERS))


class PlanError(KvtunerError):
    """A plan, or the file that holds it, cannot be used as it is."""


class CodecError(KvtunerError):
    """A cache type is unknown, or does not fit the shape it is asked to hold."""


class CalibrationError(KvtunerError):
    """A stage of the calibration got input that it cannot work with."""


class TaskError(KvtunerError):
    """Tasks cannot be read, or cannot be asked of this model."""


class NativeError(KvtunerError):
    """The native library is missing, does not match, or refused a call."""


class StoppedError(NativeError):
    """The reading of a prompt ended because the program that asked for it said so."""


class StateError(NativeError, KeyError):
    """A saved state is of another plan or model, or damaged. A KeyError as well: a cache of prompts takes it as a
    miss."""

    __str__ = Exception.__str__  # a KeyError's quotes its text
