"""Errors that a user can cause or must know of. Each message says what, what was given, what is allowed."""


class FlashMemoryError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(FlashMemoryError, ValueError):
    """A setting or argument is outside of what is allowed."""


class IntegrityError(FlashMemoryError, RuntimeError):
    """A conservation law of blocks, slots or bytes is broken: state can no longer be trusted."""


class UnsupportedError(FlashMemoryError, ValueError):
    """The combination of model, platform and options is known and refused."""
