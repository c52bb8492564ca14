"""Contenders of the benchmarks: fastrnn's own backends and its peers, one small file each.

A contender runs in a process of its own, ``python worker.py MODULE VARIANT WORKLOAD PROBLEM``,
under any interpreter that has NumPy and the peer's framework: only ``numpy_reference.py`` and the
files named after fastrnn import it. A file holds

    versions() -> dict          what was run
    WORKLOADS: dict             workload -> class

and a class has ``__init__(problem, variant)``, ``run(n)`` (do n units of work; returns when they
are done) and ``result()`` (the arrays by which the coordinator, :mod:`fastrnn.bench`, checks it
against the oracle). Units and results by workload:

    step            a training step                         loss []
    recurrence      a forward pass                          h [T, B, H]
    recurrence+bptt a forward and a backward pass           dz [T, B, H], dW_hh [H, H], dh0 [B, H]
    cross_entropy   loss and gradient from logits           loss [], dlogits [T, B, V]
    generate        one greedy character a sequence, S ≥ 1  tokens [S, n]
"""
