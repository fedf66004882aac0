"""What can go wrong, by name. Every message says where, what was found and what to do."""

import textwrap

LONGEST = 600  # characters of a message


class SparseGPTError(Exception):
    """Base of all errors of this package; the command line prints it as one line and exits with 1."""

    def __init__(self, message: str) -> None:
        """Take a message; what a file brought into it is made printable, and it is cut in the middle if it is long."""
        text = printable(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 205]} ... {text[-200:]}")


class ConfigError(SparseGPTError):
    """An option that cannot be met: an unknown pattern, a level outside [0, 1), an unknown method."""


class CheckpointError(SparseGPTError):
    """A model folder that cannot be read, or an output folder that cannot be written."""


class ModelError(SparseGPTError):
    """A model whose blocks cannot be found or driven."""


class CalibrationError(SparseGPTError):
    """Text that cannot be loaded, is too short, or leads to activations that are not finite."""


class SolverError(SparseGPTError):
    """A layer that cannot be solved: weights or moments that are not finite, or a singular Hessian."""


def printable(text: str) -> str:
    """Write what would break a line, move the cursor or cannot be encoded as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What an error of a library says, short enough for our one line."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
