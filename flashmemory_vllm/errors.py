"""Errors that a user can cause or must know of. Each message says what, what was given, what is allowed."""


class FlashMemoryError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(FlashMemoryError, ValueError):
    """A setting or argument is outside of what is allowed."""


class StorageError(FlashMemoryError, OSError):
    """A file could not be written, as on a full disk; what was there before is untouched."""


class IntegrityError(FlashMemoryError, RuntimeError):
    """A conservation law of blocks, slots or bytes is broken: state can no longer be trusted."""


class UnsupportedError(FlashMemoryError, ValueError):
    """The combination of model, platform and options is known and refused."""


class RefusedError(FlashMemoryError):
    """An engine is not started: its configuration is refused, `__cause__` says with which of the other errors.

    It is no ValueError. Those are wrapped by pydantic, in which vLLM builds its configuration: a user would get
    `1 validation error for VllmConfig` and a dump of all arguments, with the one line that matters in between.
    """
