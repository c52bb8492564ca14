"""What can be measured, and at which sizes."""

from __future__ import annotations

import dataclasses

from fastrnn.backend import Dims

HEADLINE = Dims(T=35, B=32, H=256, V=1027)
SIZES: dict[str, Dims] = {
    "headline": HEADLINE,
    "B1": dataclasses.replace(HEADLINE, B=1),
    "B256": dataclasses.replace(HEADLINE, B=256),
    "T512": dataclasses.replace(HEADLINE, T=512),
    "H64": dataclasses.replace(HEADLINE, H=64),
    "H512": dataclasses.replace(HEADLINE, H=512),
    "H1024": dataclasses.replace(HEADLINE, H=1024),
    "tiny": Dims(T=5, B=4, H=16, V=31),
}
WORKLOADS = ("step", "recurrence", "recurrence+bptt", "cross_entropy", "generate", "generate64")
MODES = ("eager", "graph", "jit")
"""How a GPU is given its work: call by call, as replays of a captured graph, or as a program that
was compiled as a whole."""
UNITS = {
    "step": "training step",
    "recurrence": "forward pass",
    "recurrence+bptt": "forward and backward pass",
    "cross_entropy": "loss and gradient",
    "generate": "character",
    "generate64": "character of each of 64 sequences",
}
