"""What ends a run from outside of its steps: a request to stop, and silence.

Both go by events and the monotonic clock: a system clock that jumps changes nothing.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

# Between two settings of the alarm: each starts a thread, too dear for every step of a small model.
_REARM_SECONDS = 0.5


class StopRequest:
    """Context manager: a signal asks the run to end.

    SIGTERM is what schedulers send before SIGKILL, SIGHUP what a terminal sends that is closed,
    SIGINT is Ctrl-C; one that the process was started to ignore (``nohup``) stays ignored. A second
    Ctrl-C interrupts at once.

    asked: whether one came. The run saves after the step it is in and exits with code 0.
    by: its name; SIGTERM too where another rank got it.

    Outside of the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked, self.by = False, signal.SIGTERM.name
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked, self.by = True, signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class Watchdog:
    """Context manager: without a sign of life for so long, the process writes its stacks and ends.

    Neither a hung collective nor a loader that waits for a dead disk ends by itself. The alarm is
    faulthandler's: a thread in C that needs no interpreter lock, writes the Python stack of every
    thread to stderr and exits with code 1.

    Args:
        seconds: from one sign of life to the alarm, up to half a second more; 0: there is none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._armed = -float("inf")

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def alive(self) -> None:
        """Begins the time anew."""
        now = time.monotonic()
        if self._seconds <= 0 or now - self._armed < min(_REARM_SECONDS, self._seconds / 4):
            return
        self._armed = now
        with contextlib.suppress(ValueError, AttributeError, OSError):  # a stderr without a file
            seconds = self._seconds + _REARM_SECONDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()
