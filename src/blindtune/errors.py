"""Every error a user can meet, and the exit code that the command line gives it.

A message says what was expected, what came, and what to do next. User mistakes raise one of
these; broken invariants are assertions; exceptions of other libraries are translated where we
call them.
"""

from __future__ import annotations


class BlindtuneError(Exception):
    """Anything that went wrong in a way we foresaw.

    Attributes:
        exit_code: what the command line returns (0 done, 2 usage or input, 3 verification
            failed, 4 refused by policy, 5 network, can be resumed).
    """

    exit_code: int = 2


class ConfigError(BlindtuneError):
    """An option is unknown, out of range, or contradicts another."""


class DataError(BlindtuneError):
    """A data file is missing, empty, malformed, or holds nothing to train on."""


class ModelError(BlindtuneError):
    """A model cannot be found, loaded or used as a decoder."""


class UnsupportedModelError(ModelError):
    """The model's family is not in the table of families (see docs/families.md)."""


class OutputError(BlindtuneError):
    """An output cannot be written: it exists already, is read-only, or the disk is full."""


class TrainingError(BlindtuneError):
    """A training run diverged: a loss or a gradient is not finite."""


class VerificationError(BlindtuneError):
    """Something that came from the other party is not what it says it is."""

    exit_code = 3


class PackageError(VerificationError):
    """A package is truncated, altered, malformed, too large, or of another version."""


class MismatchError(VerificationError):
    """A package is sound but does not belong to this model or this emulator."""


class PolicyError(BlindtuneError):
    """The request is understood, and refused."""

    exit_code = 4


class NetworkError(BlindtuneError):
    """The other party cannot be reached; the work can be resumed."""

    exit_code = 5
