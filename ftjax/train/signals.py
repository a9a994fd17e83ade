"""Ctrl-C and SIGTERM: the first one asks for a resumable save, the second one ends the process at once.

with Signals(print) as signals:
    for step in ...:
        ...
        if signals.received:
            checkpoints.wait()
            raise Interrupted(signals.received, step=step, saved=folder / str(step), command=same_command())
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ftjax.errors import FtjaxError

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(FtjaxError):  # noqa: N818 (says what happened; nothing failed)
    """A signal ended the run after its state was saved. Exit code 130 (SIGINT) or 143 (SIGTERM).

    Args:
      signum: the signal.
      step: the last finished step.
      saved: the checkpoint that holds its state, or None when nothing could be saved.
      command: what to run to go on.
    """

    def __init__(self, signum: int, *, step: int, saved: Path | str | None, command: str):
        self.signum, self.step, self.exit_code = signum, step, 128 + signum
        where = f"Everything needed to go on is in {saved}." if saved is not None else "Nothing was saved yet."
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}. {where}\nContinue with: {command}"
        )


def same_command() -> str:
    """The command line of this process, ready to paste."""
    return shlex.join(["python", *sys.argv])


class Signals:
    """While open, the first SIGINT or SIGTERM only sets `received`; a second one ends the process (130 or 143).

    Python runs a handler only between bytecodes, so a second Ctrl-C during a long compilation would wait for its end.
    Therefore a thread counts the signals from the file descriptor that the interpreter writes them to at once.

    Off the main thread, where Python allows no handlers, this does nothing.
    """

    def __init__(self, message: Callable[[str], None] = print):
        self.message = message
        self.received: int = 0  # the signal, 0 before there is one
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {s: signal.signal(s, self._first) for s in CAUGHT}
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for s, handler in self._before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()  # the watcher reads the end of the stream
        self._watcher.join()
        self._reader.close()
        self._before = {}

    def _first(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = signum
            name = signal.Signals(signum).name
            text = f"{name}: saving after this step, then leaving; once more to leave at once, without saving"
            try:
                self.message(text)
            except RuntimeError:  # it came in the midst of a print, and a stream cannot be entered twice by one thread
                os.write(2, f"{text}\n".encode())

    def _watch(self) -> None:
        count = 0
        while data := self._reader.recv(64):
            for signum in data:
                count += signum in CAUGHT
                if count > 1:
                    os.write(2, f"{signal.Signals(signum).name} again: leaving without saving\n".encode())
                    os._exit(128 + signum)
