"""The few exceptions of lowmem-drf. Every message says what happened and what to do about it."""


class LowmemError(Exception):
    """The work failed. The command ends with exit code 1."""

    exit_code = 1


class BadInputError(LowmemError):
    """What the user gave cannot be used: a preset, a key, a file, a folder. Exit code 2; nothing was written."""

    exit_code = 2


class NonFiniteError(LowmemError):
    """A reward, a gradient or a weight is NaN or infinite. Raised before the optimizer step, so the weights are still good."""
