"""fastrnn's kernels behind the interface of torch.

    rnn = fastrnn.torch.RNN(256, 256)              # torch.nn.RNN: same arguments, same weights
    model = fastrnn.torch.convert(model)           # every torch.nn.RNN in a model, in place

:class:`RNN` and :class:`CharRNN` are modules; :func:`gather`, :func:`recurrence` and
:func:`cross_entropy` are the ops under them, with gradients; :func:`clip_grad_norm_` clips.

**Tensors** are float32 or float64, on the CPU or a CUDA device; every other dtype is a TypeError.
Under ``torch.autocast`` half and bfloat16 inputs are cast up and all is done in the dtype of the
weights: the recurrence never computes in, or returns, less than float32.

**Where the work is done.** CPU tensors go to the ``numba`` backend, on torch's own threads
(``torch.set_num_threads``); CUDA tensors to the ``cupy`` backend, on torch's current stream, or
:class:`fastrnn.BackendUnavailableError` says what is missing. Products outside the recurrence, such
as that of the input with ``weight_ih``, are torch's own.

**What works.** Gradients of any order, ``torch.compile`` without graph breaks, ``torch.export``,
meta and fake tensors, deterministic algorithms (there are no others), and ``torch.func``: ``grad``,
``vjp``, ``jacrev``, ``functional_call``, and ``vmap``, which runs one by one. What does not:
derivatives in forward mode (NotImplementedError), ``torch.func.grad`` inside ``torch.compile``, and
``torch.jit.script``.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('fastrnn.torch needs torch: pip install "fastrnn[torch]"') from error

from fastrnn.torch.functional import clip_grad_norm_, cross_entropy, gather, recurrence
from fastrnn.torch.modules import RNN, CharRNN, convert

__all__ = [
    "RNN",
    "CharRNN",
    "clip_grad_norm_",
    "convert",
    "cross_entropy",
    "gather",
    "recurrence",
]
