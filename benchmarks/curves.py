"""The full run of 2,500 epochs, with the tutorial's constant rate and with one that falls.

    python -m benchmarks.curves            # train (some minutes a run), write results/curves.*
    python -m benchmarks.curves --draw     # only draw the picture again

Four runs at the headline size on the bundled corpus: both ways of sampling, both schedules. They
go to ``results/curves.json`` (perplexity by epoch) and ``results/curves.png``.
"""

from __future__ import annotations

import argparse
import datetime
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fastrnn
from fastrnn.schedules import LRSchedule, default_hold

RESULTS = Path(__file__).parent / "results"
EPOCHS = 2_500
RUNS = [(s, k) for s in ("consecutive", "random") for k in ("constant", "linear")]


def train(sampling: str, kind: str, epochs: int, backend: str) -> dict[str, Any]:
    """One run; the perplexity of every epoch, the divergence noticed, a continuation at the end."""
    corpus = fastrnn.load_corpus()
    model = fastrnn.CharRNN(corpus.vocab, backend=backend)
    hold = default_hold(epochs) if kind == "linear" else 0
    schedule = LRSchedule(kind, 100.0, epochs, hold)
    trainer = fastrnn.Trainer(model, corpus, sampling=sampling, lr_schedule=schedule)
    noticed = None
    for _ in range(epochs):
        trainer.run_epoch()
        noticed = noticed or trainer.diverged()
    trainer.restore_best()
    return {
        "sampling": sampling,
        "lr_schedule": kind,
        "hold": hold,
        "backend": model.backend.name,
        "perplexity": [float(f"{stats.perplexity:.5g}") for stats in trainer.history],
        "diverged": noticed,
        "best_epoch": trainer.best.epoch if trainer.best else None,
        "best_continuation": model.generate(["分开", "不分开"], 50),
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Perplexity by epoch on a logarithmic axis, one panel for each way of sampling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, sampling in zip(axes, ("consecutive", "random"), strict=True):
        for run in record["runs"]:
            if run["sampling"] != sampling:
                continue
            constant = run["lr_schedule"] == "constant"
            label = "constant rate (the tutorial)" if constant else "rate held, then falling"
            curve = run["perplexity"]
            axis.plot(
                range(1, len(curve) + 1),
                curve,
                color="#c0392b" if constant else "#1f5fa8",
                linewidth=1.2,
                label=f"{label}: {curve[-1]:.3g} at the end",
            )
        axis.axhline(record["V"], color="0.6", linestyle=":", linewidth=1)
        axis.annotate("a uniform guess", (1150, record["V"]), ha="center", va="bottom")
        axis.set(yscale="log", xlabel="epoch", title=f"{sampling} sampling", xlim=(0, len(curve)))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("training perplexity")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draw", action="store_true", help="only draw results/curves.json again")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "curves.json"
    if not options.draw:
        with ProcessPoolExecutor(options.jobs) as pool:
            futures = [pool.submit(train, *run, options.epochs, options.backend) for run in RUNS]
            runs = [future.result() for future in futures]
        record = {
            "date": datetime.date.today().isoformat(),
            "version": fastrnn.__version__,
            "V": len(fastrnn.load_corpus().vocab),
            "epochs": options.epochs,
            "runs": runs,
        }
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    record = json.loads(path.read_text())
    draw(record, RESULTS / "curves.png")
    for run in record["runs"]:
        print(
            f"{run['sampling']:<12} {run['lr_schedule']:<9} last {run['perplexity'][-1]:<8.4g} "
            f"best {min(run['perplexity']):.4g} in epoch {run['best_epoch']}; "
            f"{run['diverged'] or 'did not diverge'}"
        )


if __name__ == "__main__":
    main()
