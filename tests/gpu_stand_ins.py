"""What takes a GPU's place where a run on one is tried: the emulator, Numba's simulator, stubs."""

from __future__ import annotations

import contextlib

from fastrnn.backend import Backend

_open = contextlib.ExitStack()
"""The simulator stays repaired to the end of the process."""


def open_stand_in(name: str) -> Backend:
    """A backend whose kernels run on the CPU: ``cupy`` emulated, ``numba-cuda`` simulated.

    The simulator takes the place of numba's CUDA module for good: ``NUMBA_ENABLE_CUDASIM=1`` must
    be in the environment of the process.
    """
    if name == "cupy":
        from fastrnn.backends.cupy_cuda import CupyBackend
        from tests.emulated_device import EmulatedDevice

        return CupyBackend(EmulatedDevice())
    if name == "numba-cuda":
        from fastrnn.backends.numba_cuda import NumbaCudaBackend
        from tests.numba_cuda_simulator import TOY, repaired_simulator

        _open.enter_context(repaired_simulator())
        return NumbaCudaBackend(TOY)
    raise ValueError(f"no stand-in for the backend {name!r}: expected cupy or numba-cuda")


def open_cupy_on_stub(name: str) -> Backend:
    """``cupy`` on real CuPy, whose CUDA is a stub: graphs, events and streams are CuPy's own.

    Kernels run in the emulator; a time is what the stub says, a millisecond between two events.
    """
    from tests import stub_cuda

    stub = stub_cuda.StubCuda()
    stub_cuda.install(stub)
    _open.enter_context(stub_cuda.occupancy(stub))
    from fastrnn.backends.cupy_cuda import CupyBackend

    return CupyBackend(stub_cuda.stubbed_device(stub)())
