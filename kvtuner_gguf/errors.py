"""The errors that a user can meet. Anything else that is raised is a bug of ours."""


class KvtunerError(Exception):
    """Base of all errors whose message is written for the user."""


class PlanError(KvtunerError):
    """A plan, or the file that holds it, cannot be used as it is."""


class CodecError(KvtunerError):
    """A cache type is unknown, or does not fit the shape it is asked to hold."""


class CalibrationError(KvtunerError):
    """A stage of the calibration got input that it cannot work with."""


class NativeError(KvtunerError):
    """The native library is missing, does not match, or refused a call."""
