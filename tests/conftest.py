"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Interrupts are tested; a suite that a script starts in its background inherits that they are ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
