"""SIGTERM and Ctrl-C: at once while a run is being set up, at the end of the update once it trains."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Exception for a signal that asks the program to end. `saved` tells the user what was saved."""

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.saved = saved


class Stop:
    """Signal handler and flag: the training loop reads `signum` at the end of each update.

    If `deferred` is True, the first signal only sets `signum`, and a second one raises `Interrupted`. Otherwise each
    signal raises `Interrupted` at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal: if `deferred`, store the first one in `signum` and print a line to stderr, else raise.

        `frame` is not used.

        Raises:
            Interrupted: `deferred` is False, or `signum` holds an earlier signal.
        """
        if not self.deferred or self.signum is not None:  # a second signal does not wait
            raise Interrupted(signum)
        self.signum = signum
        print(f"gpt-fast: {signal.Signals(signum).name}: saving after this update", file=sys.stderr)


@contextmanager
def caught() -> Iterator[Stop]:
    """Yield a `Stop` that handles SIGINT and SIGTERM inside the block, and restore the previous handlers afterwards.

    Outside of the main thread, where Python sets no handlers, the `Stop` gets no signal.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = [signal.signal(signum, stop) for signum in SIGNALS]
    try:
        yield stop
    finally:
        for signum, handler in zip(SIGNALS, before, strict=True):
            signal.signal(signum, handler)
