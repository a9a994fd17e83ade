"""One process per run folder: a lock that dies with its owner and says who that is.

lock = Lock(folder / "lock", message=print)
lock.acquire()        # CheckpointError naming pid and host if another process is at work
lock.release()
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ftjax.errors import CheckpointError


class Lock:
    """`flock` on a file whose content names the owner; a release clears it, so content without a lock tells of a crash.

    The kernel drops the lock when its owner dies. Two cases need the content: a child that a killed owner left behind
    still holds the inherited lock, and `flock` does not reach other hosts on some network file systems.
    """

    def __init__(self, path: Path, message: Callable[[str], None]):
        self.path, self.message = path, message
        self._fd: int | None = None

    def acquire(self) -> None:
        """Takes the lock, also from a process that is dead.

        Raises:
          CheckpointError: another process holds it, or may hold it on another host.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        free, owner = _try_lock(fd), _owner(fd)
        here = owner is not None and owner["host"] == socket.gethostname()
        if not free and owner and here and not _alive(owner["pid"]):
            # A child that the dead owner left behind keeps the old file; we go on with a new one.
            os.close(fd)
            self.path.unlink(missing_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            free = _try_lock(fd)
        if not free or (owner and not here):
            os.close(fd)
            hint = f"\nIf that process is gone, delete {self.path} and start again." if free else ""
            raise CheckpointError(self._refusal(owner) + hint)
        if owner:
            self.message(f"took over {self.path.parent} from process {owner['pid']}, which ended without a goodbye")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(me).encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Gives the lock back."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = None

    def _refusal(self, owner: dict | None) -> str:
        who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
        return f"{self.path.parent} is in use by {who}. Wait for it, stop it, or choose another folder with out=..."


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(fd: int) -> dict | None:
    """Who wrote into the lock file; None after a clean release or while the owner is just writing."""
    try:
        return json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and somebody else's
        return True
    return True
