"""metrics.jsonl is exact, ordered and whole; TensorBoard never gets in the way; early stopping is counters."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import CheckpointError
from ftjax.train import metrics
from ftjax.train.early_stop import EarlyStop
from ftjax.train.metrics import MetricLog, read_lines


def make(folder, said=None, tensorboard=False) -> MetricLog:
    folder.mkdir(exist_ok=True)
    return MetricLog(folder, message=(said if said is not None else []).append, tensorboard=tensorboard)


def test_lines_are_sorted_json_and_numbers_keep_every_bit(tmp_path):
    log = make(tmp_path)
    values = {
        "z": 0.1 + 0.2,
        "f32": jnp.float32(0.1),
        "bf16": jnp.bfloat16(1.7),
        "i": np.int64(2**53 + 1),
        "a": 5e-324,
        "m": -0.0,
    }
    log.metrics("train", 1, values)
    line = (tmp_path / "metrics.jsonl").read_text()  # there before any close or flush
    assert line == (
        '{"a": 5e-324, "bf16": 1.703125, "event": "train", "f32": 0.10000000149011612, "i": 9007199254740993, '
        '"m": -0.0, "step": 1, "z": 0.30000000000000004}\n'
    )
    back = read_lines(tmp_path / "metrics.jsonl")[0]
    assert np.float32(back["f32"]) == np.float32(0.1) and back["z"] == 0.1 + 0.2 and math.copysign(1, back["m"]) == -1
    log.close()


def test_every_float32_round_trips(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    numbers = bits.view(np.float32)
    log = make(tmp_path)
    for i, x in enumerate(numbers):
        log.metrics("train", i, {"x": x})
    log.close()
    back = np.array([r["x"] for r in read_lines(tmp_path / "metrics.jsonl")], np.float32)
    assert np.array_equal(back, numbers, equal_nan=True)
    assert np.array_equal(back.view(np.uint32)[~np.isnan(numbers)], bits[~np.isnan(numbers)])


def test_non_finite_numbers_are_valid_json(tmp_path):
    log = make(tmp_path)
    log.metrics("train", 1, {"a": math.nan, "b": jnp.float32(np.inf), "c": -math.inf, "d": [math.nan]})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": ["NaN"], "event": "train", "step": 1,
    }  # fmt: skip
    back = read_lines(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(back["a"]) and back["b"] == math.inf and back["c"] == -math.inf and math.isnan(back["d"][0])


def test_times_and_samples_have_their_own_files(tmp_path):
    log = make(tmp_path)
    log.timing(3, {"seconds": 0.5})
    log.sample(3, {"prompt": "naïve \ud800 \n", "answer": "x"})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert read_lines(tmp_path / "timing.jsonl") == [{"step": 3, "seconds": 0.5}]
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": "naïve \ud800 \n", "answer": "x"}]


@pytest.mark.parametrize("torn", [b"", b'{"event": "tr', b'{"step": 9', b"\0\0\0\0", b'{"step"\n', b"\0\0\n\0"])
def test_truncation_on_resume(tmp_path, torn):
    log = make(tmp_path)
    for step in range(6):
        log.metrics("train", step, {"loss": step / 3})
        log.timing(step, {"seconds": 1.0})
        if step % 2 == 0:
            log.metrics("eval", step, {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 9
    log = make(tmp_path)
    log.truncate_after(4)
    log.metrics("train", 5, {"loss": 5 / 3})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole[: len(whole) - len(torn)]
    assert [r["step"] for r in read_lines(tmp_path / "timing.jsonl")] == [0, 1, 2, 3, 4]
    log = make(tmp_path)
    log.truncate_after(None)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"stp": 2}\n{"step": 3}\n')
    log = make(tmp_path)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: not a line that was written here: b'\{\"stp\": 2\}"):
        log.truncate_after(1)


def test_a_full_disk_loses_no_line(tmp_path, monkeypatch):
    said: list[str] = []
    log = make(tmp_path, said)
    log.metrics("train", 1, {"loss": 1.0})
    real = os.write
    with monkeypatch.context() as m:
        m.setattr(os, "write", lambda fd, data: real(fd, data[:7]))  # half a line, as a full disk does
        log.metrics("train", 2, {"loss": 2.0})
        log.metrics("train", 3, {"loss": 3.0})
        assert said == [
            f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device: {tmp_path / 'metrics.jsonl'}; "
            "its lines are kept in memory for now"
        ]
        assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1]
        log.sync()  # once is forgiven
    log.metrics("train", 4, {"loss": 4.0})
    log.sync()
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    with monkeypatch.context() as m:
        m.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
        log.metrics("train", 5, {"loss": 5.0})
        log.sync()
        with pytest.raises(CheckpointError, match="No space left on device.*; 1 lines are lost"):
            log.sync()
    log.close()


@pytest.fixture
def tensorboardx(monkeypatch):
    """The reader that nobody here wrote. Its package imports torch for other ends; hidden, that takes no 5 seconds."""
    monkeypatch.setitem(sys.modules, "torch", None)
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    def read(path):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + size]
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            assert int.from_bytes(data[12 + size : 16 + size], "little") == masked_crc32c(body)
            yield Event.FromString(body)
            data = data[16 + size :]

    return read


def test_tensorboard_has_the_curves(tmp_path, tensorboardx):
    log = make(tmp_path, tensorboard=True)
    for step in range(300):
        log.metrics("train", step, {"loss": 0.5 * step, "name": "text is no curve"})
    for step, x in enumerate([math.nan, -math.inf, 1e300, -1e300, 0.1]):
        log.metrics("odd", step, {"x": x})
    log.sample(3, {"prompt": "p\nq", "answer": "ä \ud800"})
    log.timing(2**40, {"seconds": 0.5})
    log.truncate_after(20)
    log.close()
    (file,) = (tmp_path / "tb").iterdir()
    events = list(tensorboardx(file))
    assert events[0].file_version == "brain.Event:2" and abs(events[1].wall_time - time.time()) < 60
    values = {(v.tag, e.step): v for e in events for v in e.summary.value}
    assert [values["train/loss", s].simple_value for s in range(300)] == [0.5 * s for s in range(300)]
    odd = np.array([values["odd/x", s].simple_value for s in range(5)])
    assert np.array_equal(odd, [math.nan, -math.inf, math.inf, -math.inf, np.float32(0.1)], equal_nan=True)
    assert values["timing/seconds", 2**40].simple_value == 0.5
    text = values["samples", 3]
    assert text.metadata.plugin_data.plugin_name == "text" and text.tensor.dtype == 7
    assert [d.size for d in text.tensor.tensor_shape.dim] == [1]
    assert [s.decode() for s in text.tensor.string_val] == ["**prompt**: p\nq  \n**answer**: ä ?"]
    assert not any("name" in tag for tag, _ in values)
    assert [(e.step, e.session_log.status) for e in events if e.HasField("session_log")] == [(21, 1)]
    log = make(tmp_path, tensorboard=True)
    log.close()
    assert len(list((tmp_path / "tb").iterdir())) == 2  # the first is not overwritten


def test_the_run_does_not_import_torch():
    code = "import sys, ftjax.train.metrics as m; assert not {'torch', 'tensorboardX'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("when", ["open", "write", "flush", "close"])
def test_failing_tensorboard_warns_once_and_stops_nothing(tmp_path, monkeypatch, when):
    class Full:
        """A file on a full disk."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            if name == when:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return getattr(self.file, name)

    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        if "tfevents" in path.name and when == "open":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file = real(path, mode, *args, **kwargs)
        return Full(file) if "tfevents" in path.name else file

    monkeypatch.setattr(Path, "open", opened)
    said: list[str] = []
    log = make(tmp_path, said, tensorboard=True)
    board = log._board
    for step in range(30):
        log.metrics("train", step, {"loss": 1.0})
    log.sync()
    log.close()
    if board._file:
        board._file.file.close()
    assert said == ["TensorBoard is off from here on: No space left on device. metrics.jsonl has everything"]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 30


def test_values_that_are_no_json_are_refused(tmp_path):
    log = make(tmp_path)
    with pytest.raises(TypeError):
        log.metrics("train", 1, {"x": {1, 2}})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert metrics.to_json({"a": (np.float64(1), True, None)}) == {"a": [1.0, True, None]}
    log.close()


def test_early_stop_counts():
    stop = EarlyStop(patience=2, min_delta=0.1)
    seen = []
    for step, value in enumerate([3.0, 2.0, 1.95, math.nan, 1.0, 0.95, 1.5]):
        stop = stop.update(step, value)
        seen.append((stop.improved, stop.waited, stop.exhausted))
    assert seen == [
        (True, 0, False), (True, 0, False), (False, 1, False), (False, 2, True), (True, 0, False), (False, 1, False),
        (False, 2, True),
    ]  # fmt: skip
    assert (stop.best, stop.best_step) == (1.0, 4)


def test_early_stop_resumes_and_zero_patience_never_stops():
    values = [3.0, 3.0, 2.0, 2.5, 2.5, 2.5, 1.0]
    whole = EarlyStop(patience=3)
    for step, value in enumerate(values):
        whole = whole.update(step, value)
    for cut in range(len(values)):
        part = EarlyStop(patience=3)
        for step, value in enumerate(values):
            if step == cut:
                part = EarlyStop(patience=3).restored(json.loads(json.dumps(part.to_json())))
            part = part.update(step, value)
        assert part == whole
    never = EarlyStop()
    for step in range(50):
        never = never.update(step, math.nan)
    assert not never.exhausted and never.best is None and not never.improved
