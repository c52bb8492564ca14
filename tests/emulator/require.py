"""When a test may do without the emulator: nowhere that FASTRNN_REQUIRE_EMULATOR is set."""

from __future__ import annotations

import os

import pytest

from tests.emulator.build import emulator_unavailable


def require_emulator() -> None:
    """Skip the calling test where the emulator cannot run, or fail it where it must."""
    reason = emulator_unavailable()
    if reason is None:
        return
    if os.environ.get("FASTRNN_REQUIRE_EMULATOR"):
        pytest.fail(reason)
    pytest.skip(reason)
