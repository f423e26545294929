"""Being asked to stop: a pre-empting scheduler, a person, a launcher that shuts down.

The signal only sets a flag. The loop looks at it together with the other ranks at the end of each
logging window, saves a checkpoint and ends with `EXIT_STOPPED`; the same command goes on from there.
"""

import faulthandler
import signal
from types import FrameType

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: run me again

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def show_stack_on_request() -> None:
    """From now on SIGUSR2 prints where this process is: `mosaicbert launch` asks ranks that hang."""
    faulthandler.register(signal.SIGUSR2)


class StopRequest:
    """True once this process has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at the keyboard: stop now, without saving
        self.signal = signal.Signals(number)
