"""Where fastrnn lies, and where the peers do: beside it in a checkout, in it once installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
_PEER_FOLDERS = (PACKAGE / "peers", PACKAGE.parent / "benchmarks" / "peers")
PEER_FOLDER = next((d for d in _PEER_FOLDERS if d.is_dir()), _PEER_FOLDERS[0])
