"""The CUDA C engine: launchers of the kernels in ``kernels/*.cu``, one module an op.

A launcher computes a kernel's geometry and submits it to a :class:`~fastrnn.cuda.device.Device`: a
GPU through CuPy, or, in the tests, an emulator of one. The ``cupy`` backend composes the launchers.
"""
