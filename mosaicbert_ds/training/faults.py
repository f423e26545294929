"""Being asked to stop: a pre-empting scheduler, a person, a launcher that shuts down.

The signal only sets a flag. The loop looks at it together with the other ranks at the end of each
logging window, saves a checkpoint and ends with `EXIT_STOPPED`; the same command goes on from there.
"""

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: run me again

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def show_stack_on_request() -> None:
    """From now on SIGUSR2 prints where this process is: `mosaicbert launch` asks ranks that hang."""
    faulthandler.register(signal.SIGUSR2)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals to stop wait meanwhile, and do so for good in processes that are started in here, until one of
    them makes a `StopRequest`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """True once this process has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in _SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at the keyboard: stop now, without saving
        self.signal = signal.Signals(number)
