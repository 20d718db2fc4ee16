"""The compiler half of the shim; never called."""

import triton.backends.compiler as _base


class InterpretedBackend(_base.BaseBackend):
    """Supports only the target that the shim's driver reports."""

    @staticmethod
    def supports_target(target: _base.GPUTarget) -> bool:
        """Whether the target is the CPU."""
        return bool(target.backend == "cpu")


# Triton looks for exactly one concrete class here and takes abstract methods for an unfinished one.
InterpretedBackend.__abstractmethods__ = frozenset()
