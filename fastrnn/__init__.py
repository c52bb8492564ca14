"""fastrnn: a kernel-optimised engine for the vanilla tanh RNN."""

from fastrnn.backend import BackendUnavailableError, available_backends, open_backend

__version__ = "0.1.0"

__all__ = ["BackendUnavailableError", "__version__", "available_backends", "open_backend"]
