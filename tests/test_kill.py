"""Fifty processes killed while they save: the checkpoint is always the old one or the new one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import fastrnn
from fastrnn.checkpoint import load_checkpoint, save_checkpoint

KILLS = 50

# Saves generations 1, 2, 3, … of 400 kB each; every tensor holds the generation's number.
SAVER = """
import itertools, sys
import numpy as np
from fastrnn.checkpoint import save_checkpoint
print("ready", flush=True)
for generation in itertools.count(int(sys.argv[2])):
    tensors = {name: np.full(50_000, generation, np.float32) for name in "ab"}
    save_checkpoint(sys.argv[1], tensors, {"generation": generation})
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    first = {name: np.zeros(50_000, np.float32) for name in "ab"}
    save_checkpoint(path, first, {"generation": 0})
    root = str(Path(fastrnn.__file__).parent.parent)
    rng = random.Random(7)
    last = 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path), str(last + 1)],
            stdout=subprocess.PIPE,
            cwd=root,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.03))
        process.kill()
        process.wait()
        process.stdout.close()
        tensors, header = load_checkpoint(path)
        generation = header["generation"]
        assert generation >= last, f"kill {kill} brought an older checkpoint back"
        for array in tensors.values():
            assert array.shape == (50_000,)
            assert (array == generation).all(), f"kill {kill} left a mixture"
        last = generation
    assert last > KILLS / 2, "the saver was hardly ever in the middle of its work"
