"""The first signal asks, the second one ends; both give the shell its usual exit code."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ftjax.errors import FtjaxError
from ftjax.train.signals import Interrupted, Signals, same_command

PROGRAM = """
import sys, time
from ftjax.train.signals import Interrupted, Signals
say = lambda text: print(text, flush=True)
try:
    with Signals(say) as signals:
        say("ready")
        step = 0
        while not signals.received:
            step += 1
            time.sleep(0.01)
        if "busy" in sys.argv:                       # a compilation: no bytecode of this thread runs
            import ctypes
            say("busy")
            ctypes.CDLL(None).sleep(60)              # releases the GIL, and EINTR does not run the Python handler
            ctypes.CDLL(None).sleep(60)
        raise Interrupted(signals.received, step=7, saved="runs/x/checkpoints/7", command="python run.py --config a.py")
except Interrupted as e:
    say(str(e))
    sys.exit(e.exit_code)
"""

SAVING = "{}: saving after this step, then leaving; once more to leave at once, without saving\n"


def start(*args: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_saves_and_leaves(sig, code):
    process = start()
    process.send_signal(sig)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    # Where the signal met the print of "ready", which a busy machine sees often, the answer to it is on the other stream.
    said = SAVING.format(sig.name)
    assert (out + err).count(said) == 1
    assert (out + err).replace(said, "") == (
        f"stopped by {sig.name} after step 7. Everything needed to go on is in runs/x/checkpoints/7.\n"
        "Continue with: python run.py --config a.py\n"
    )


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_even_where_no_python_runs(sig, code):
    process = start("busy")
    process.send_signal(sig)
    assert any(line == "busy\n" for line in process.stdout), process.stderr.read()
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(sig)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and time.monotonic() - began < 5
    assert err.removeprefix(SAVING.format(sig.name)) == f"{sig.name} again: leaving without saving\n"


class Interrupting(io.RawIOBase):
    """A file at whose first write a signal arrives, while the buffer above it is at work."""

    def __init__(self):
        super().__init__()
        self.writes = 0

    def writable(self) -> bool:
        return True

    def write(self, b) -> int:
        self.writes += 1
        if self.writes == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return len(b)


def test_a_signal_in_the_midst_of_a_print_is_no_error(capfd):
    out = io.TextIOWrapper(io.BufferedWriter(Interrupting()))
    with Signals(lambda text: print(text, file=out, flush=True)) as signals:
        print("step 7", file=out, flush=True)
        assert signals.received == signal.SIGTERM
    assert capfd.readouterr().err.startswith("SIGTERM: saving after this step")


def test_handlers_come_back():
    # A shell that starts the suite in the background makes its children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    said: list[str] = []
    with Signals(said.append) as signals:
        assert signal.getsignal(signal.SIGTERM) != before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM and len(said) == 1
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert not any(t.name == "signals" for t in threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Signals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


def test_off_the_main_thread_nothing_is_touched():
    before = signal.getsignal(signal.SIGINT)
    seen: list[int] = []

    def work() -> None:
        with Signals() as signals:
            assert signal.getsignal(signal.SIGINT) == before
            seen.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


def test_interrupted_texts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", "my config.py", "optim.lr=1e-3"])
    e = Interrupted(signal.SIGTERM, step=0, saved=None, command=same_command())
    assert isinstance(e, FtjaxError) and e.exit_code == 143
    assert str(e) == (
        "stopped by SIGTERM after step 0. Nothing was saved yet.\n"
        "Continue with: python run.py --config 'my config.py' optim.lr=1e-3"
    )
