"""TensorBoard event files in the few bytes that curves and texts need, written in the calling thread.

    board = Board(folder / "tb", message=print)
    board.scalar("train/loss", step, 0.5)

A file is a chain of records ``length, crc(length), data, crc(data)``; the data is a protobuf message `Event`.
Written here rather than by tensorboardX for two reasons, both measured: importing that imports torch wherever it is
installed (5 s), and its `SummaryWriter` hands events to a thread through a queue of ten, so when the disk fails the
thread ends and the eleventh event blocks the training for ever.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ftjax.train.files import reason_of

FLUSH_SECONDS = 10  # someone may be watching


class Board:
    """One event file. A failure is reported once, and then everything is ignored: a view may never end a run."""

    def __init__(self, folder: Path, message: Callable[[str], None]):
        self.folder, self.message = folder, message
        self._file: BinaryIO | None = None
        self._flush_at = 0.0
        self._dead = False
        self._try(self._open)

    def scalar(self, tag: str, step: int, value: float) -> None:
        """One point of a curve."""
        point = _text(1, tag) + _tag(2, 5) + struct.pack("<f", _float32(value))
        self._try(lambda: self._event(step, _bytes(5, _bytes(1, point))))

    def text(self, tag: str, step: int, text: str) -> None:
        """A piece of markdown."""
        metadata = _bytes(9, _bytes(1, _text(1, "text")))
        tensor = _bytes(8, _int(1, 7) + _bytes(2, _bytes(2, _int(1, 1))) + _text(8, text))  # one string
        self._try(lambda: self._event(step, _bytes(5, _bytes(1, _text(1, tag) + metadata + tensor))))

    def restart(self, step: int) -> None:
        """Tells TensorBoard to hide what it has from `step` on."""
        self._try(lambda: self._event(step, _bytes(7, _int(1, 1))))  # SessionLog.START

    def flush(self) -> None:
        """Hands everything to the system."""
        self._try(lambda: self._file.flush() if self._file else None)

    def close(self) -> None:
        """Ends the file."""
        self._try(lambda: self._file.close() if self._file else None)
        self._dead = True

    def _open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._file = (self.folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("xb")
        self._event(0, _text(3, "brain.Event:2"))

    def _event(self, step: int, what: bytes) -> None:
        assert self._file is not None
        data = _tag(1, 1) + struct.pack("<d", time.time()) + _int(2, step) + what
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", _masked_crc(length)) + data + struct.pack("<I", _masked_crc(data)))
        if time.monotonic() > self._flush_at:
            self._flush_at = time.monotonic() + FLUSH_SECONDS
            self._file.flush()

    def _try(self, action: Callable[[], object]) -> None:
        if self._dead:
            return
        try:
            action()
        except Exception as e:
            self._dead = True
            with contextlib.suppress(OSError):
                if self._file:
                    self._file.close()
            self.message(f"TensorBoard is off from here on: {reason_of(e)}. metrics.jsonl has everything")


def _float32(value: float) -> float:
    """`value`, or the infinity that float32 makes of it."""
    try:
        struct.pack("<f", value)
        return value
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


# Protobuf: a tag (field number and wire type), then the value.


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _int(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode("utf-8", "replace"))


# CRC-32C (Castagnoli), masked as TFRecord wants it.


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return tuple(table)


def _masked_crc(data: bytes) -> int:
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
