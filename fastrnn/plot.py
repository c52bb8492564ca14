"""Training curves as pictures. Matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrnn.trainer import EpochStats


class PlotUnavailableError(ImportError):
    """Matplotlib is not installed."""


def require_matplotlib() -> Any:
    """Import pyplot with a backend that needs no display.

    Raises:
        PlotUnavailableError: matplotlib is missing; the message holds the install line.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlotUnavailableError(
            f"drawing needs matplotlib ({error}): python -m pip install 'fastrnn[plot]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_format(path: Path) -> None:
    """Find out before the work that no picture can be written under this name.

    Raises:
        ValueError: the ending is not one that matplotlib knows.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"}  # which needs LaTeX
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"cannot draw {path}: expected a name that ends in one of {', '.join(sorted(known))}"
        )


def plot_curves(
    path: str | Path, curves: Mapping[str, Sequence[EpochStats]], title: str = ""
) -> None:
    """Draw perplexity by epoch, on a logarithmic axis, one line a run, its best epoch marked.

    Args:
        path: of the picture; its ending chooses the format (png, svg, pdf).
        curves: the epochs of each run by its label; validation is drawn dashed where there is one.
        title: of the picture.
    """
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for label, stats in curves.items():
        epochs = [s.epoch for s in stats]
        (line,) = axis.plot(epochs, [s.perplexity for s in stats], linewidth=1.4, label=label)
        held_out = [(s.epoch, s.val_perplexity) for s in stats if s.val_perplexity is not None]
        if held_out:
            axis.plot(
                *zip(*held_out, strict=True),
                color=line.get_color(),
                linestyle="--",
                linewidth=1.2,
                label=f"{label}, validation",
            )
        if stats:
            best = min(stats, key=lambda s: s.score)
            axis.plot(best.epoch, best.score, "o", color=line.get_color(), markersize=5)
            axis.annotate(
                f"best {best.score:.3g} in epoch {best.epoch}",
                (best.epoch, best.score),
                textcoords="offset points",
                xytext=(-6, 8),
                ha="right",
                fontsize=9,
            )
    axis.set(yscale="log", xlabel="epoch", ylabel="perplexity", title=title)
    axis.grid(alpha=0.25, which="both")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
