"""How fast this machine runs fastrnn, and how fast it runs the peers that are installed on it.

Every contender, our backends and the peers alike, runs in a process of its own (see
``benchmarks/peers``), so that no library's thread pool sits in another's way and memory and
compilation are measured one by one. The coordinator, :func:`measure`,

    makes one problem -> starts the workers, in turn or side by side -> checks each against the
    oracle -> lets them take turns, in another order every round, while all others sleep on a pipe

and compares medians round by round: a ratio is the median over rounds of (peer / ours), so a
machine that slows down for a while slows down both. On a GPU graphs are paired with graphs, and
eager calls with eager calls. A contender whose result is wrong gets no time; one that is not
installed or cannot be built is reported as missing, with the reason, and one that takes too long is
stopped.
"""

from fastrnn.bench.contenders import (
    GPU_PEERS,
    GPU_SLOW_PEERS,
    PEERS,
    Contender,
    backend_contender,
    choose_contenders,
    graph_contender,
)
from fastrnn.bench.formatting import format_seconds, markdown_table
from fastrnn.bench.measurement import SETTLE_SECONDS, Measurement, measure
from fastrnn.bench.paths import PEER_FOLDER
from fastrnn.bench.problems import CHECK_CHARACTERS, make_problem, relative_error, zipf_tokens
from fastrnn.bench.provenance import commit, machine, machine_slug
from fastrnn.bench.results import BenchResult, Row
from fastrnn.bench.roofline import Work, work
from fastrnn.bench.run import run_bench
from fastrnn.bench.summary import paired_ratio
from fastrnn.bench.worker import Worker, WorkerError, WorkerTimeoutError
from fastrnn.bench.workloads import HEADLINE, MODES, SIZES, UNITS, WORKLOADS

__all__ = [
    "CHECK_CHARACTERS",
    "GPU_PEERS",
    "GPU_SLOW_PEERS",
    "HEADLINE",
    "MODES",
    "PEERS",
    "PEER_FOLDER",
    "SETTLE_SECONDS",
    "SIZES",
    "UNITS",
    "WORKLOADS",
    "BenchResult",
    "Contender",
    "Measurement",
    "Row",
    "Work",
    "Worker",
    "WorkerError",
    "WorkerTimeoutError",
    "backend_contender",
    "choose_contenders",
    "commit",
    "format_seconds",
    "graph_contender",
    "machine",
    "machine_slug",
    "make_problem",
    "markdown_table",
    "measure",
    "paired_ratio",
    "relative_error",
    "run_bench",
    "work",
    "zipf_tokens",
]
