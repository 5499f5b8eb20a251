"""The errors a user can cause or meet. The command line prints each in one line and exits with 1."""

from __future__ import annotations

import re

from schemas.secrets import redact


def first_line(error: BaseException) -> str:
    """What a library's error says, without the trace that may follow; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """All that an error says, without colours: for one whose first line names neither the file nor the cause."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())


class PipelineError(Exception):
    """Base of every known error; its message says what was wrong, the value, and the way out, without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))

    @property
    def kind(self) -> str:
        """The class name without ``Error``, as printed in the JSON under ``kind``."""
        return type(self).__name__.removesuffix("Error")


class ConfigError(PipelineError):
    """A setting is unknown, malformed, or contradicts another one."""


class DataError(PipelineError):
    """An input table is missing, unreadable, of the wrong shape, or empty."""


class FingerprintMismatchError(PipelineError):
    """Vectors or weights of two different item towers were about to be mixed."""


class NotFoundError(PipelineError):
    """Something named by the user (a user, an item, a snapshot, a tower) is not in the store."""


class StoreError(PipelineError):
    """A file of the store is damaged, missing, or of an unknown format."""


class DiskFullError(PipelineError):
    """The disk is full; nothing half-written was published."""


class EmbeddingError(PipelineError):
    """The item tower produced something that must not be stored (NaN, overflow, a zero vector)."""


class GateError(PipelineError):
    """A figure of tonight's output is outside its limit; nothing was published."""


class ClusterError(PipelineError):
    """Ray did not start, or its session died."""


class TrainingError(PipelineError):
    """A training cannot go on."""


class DownloadError(PipelineError):
    """A download failed or did not have the expected checksum."""


class ReleaseError(PipelineError):
    """The parts of a release do not match, or the champion is not the one that was expected."""


class TrackingError(PipelineError):
    """The MLflow server or its registry cannot be reached, or refused a request."""
