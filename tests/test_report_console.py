"""What a run prints: plain lines off a terminal, colour on one, foreign text never obeyed; tables that add up."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ftjax.config import Compute, Loader, Optim, Run, Train
from ftjax.data.preview import PreviewExample, Span
from ftjax.report.console import MOST, Console
from ftjax.report.grid import markdown
from ftjax.report.memory import device_bytes, host_memory, memory_report
from ftjax.report.parameters import parameter_report
from ftjax.report.samples import comparison, pair
from ftjax.report.units import Ema, clock, number, percent, short, size, visible
from ftjax.train.session import Answer
from tests import tiny

KIB = 1024
EXAMPLE = PreviewExample(
    "train.jsonl:7", (Span("<s>Question: ", False), Span("blue\n", True), Span("<pad>", False)), 6, 2, trains_eos=False
)
BEFORE = [Answer("1+1=", "3", "2"), Answer("2+2=", "5", "4")]
AFTER = [Answer("1+1=", "2", "2"), Answer("3+3=", "6", "6")]


class Screen(io.StringIO):
    """A terminal that remembers what was written."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def said(*calls, stream: io.StringIO | None = None, width: int = 100) -> str:
    """What a console writes in some calls ``(method, *arguments)``."""
    stream = stream or io.StringIO()
    console = Console(stream, width=width)
    for name, *arguments in calls:
        getattr(console, name)(*arguments)
    return stream.getvalue()


def parameters():
    """A hand-made split of a tiny Llama: LoRA of rank 4 on q over all four layers, on down over the last one."""
    table = tiny.llama().table
    store = {k: np.zeros(s.shape, np.float16) for k, s in table.items() if s.kind != "site"}
    q, down = "layers[0:4]/q/w", "layers[3:4]/down/w"
    a, b = np.zeros((4, 32, 4), np.float32), np.zeros((4, 4, 32), np.float32)
    trained = {
        q: {"a": a, "b": b},
        down: {"a": np.zeros((1, 64, 4), np.float32), "b": np.zeros((1, 4, 32), np.float32)},
    }
    groups = {"overlay": {k: {"a": "lora_a", "b": "lora_b"} for k in trained}}
    fixed = {"overlay": {q: {"scale": np.zeros(4, np.float32)}}}
    return parameter_report(table, {"overlay": trained}, fixed, {"base": store}, groups)


def memory(**changes):
    compiled = SimpleNamespace(
        temp_size_in_bytes=10 * KIB, output_size_in_bytes=5 * KIB, alias_size_in_bytes=4 * KIB,
        generated_code_size_in_bytes=0, argument_size_in_bytes=9 * KIB,
    )  # fmt: skip
    sizes = {"frozen_bytes": 4 * KIB, "trainable_bytes": KIB, "opt_bytes": 2 * KIB, "compiled": compiled}
    return memory_report(**(sizes | {"limit": 100 * KIB} | changes))


# Off a terminal ------------------------------------------------------------------------------------------------------


def test_off_a_terminal_there_is_plain_text_only():
    out = said(
        ("header", Run()), ("parameters", parameters()), ("memory", memory()), ("preview", [EXAMPLE]),
        ("evaluation", 3, {"loss": 2.5}), ("comparison", {"loss": 3.0}, {"loss": 2.5}), ("samples", BEFORE, AFTER),
        ("where", {"run": "runs/x"}), ("warn", "look"), ("note", "so it is"),
    )  # fmt: skip
    assert "\x1b" not in out and "\r" not in out
    assert not any(line != line.rstrip() for line in out.splitlines() if "[[" not in line)
    assert "warning: look\nso it is\n" in out


def test_the_header_has_ten_lines_and_names_what_was_set():
    run = Run(
        name="mine", seed=7, optim=Optim(lr=3e-4, warmup=5, clip=0.5), train=Train(steps=50, batch=8, accumulate=2)
    )
    lines = said(("header", run)).splitlines()
    assert lines[0] == "run mine" and len(lines) == 11
    assert "  optim     adamw, lr 0.0003, linear, warm-up 5, clip 0.5" in lines
    assert any(x.startswith("  steps     50 steps x 8 rows (in 2 micro-batches) x 512 tokens") for x in lines)
    assert "  seed      7" in lines and "  out       runs/mine" in lines


def test_the_preview_marks_what_is_trained_by_brackets():
    lines = said(("preview", [EXAMPLE])).splitlines()
    assert lines[0] == "what reaches the loss: [[...]] is trained, the rest is masked"
    assert lines[1] == "  example 1, train.jsonl:7: 2 of 6 tokens trained, EOS is not trained"
    assert lines[2:] == ["    <s>Question: [[blue", "    ]]<pad>"]


def test_compiling_is_one_line_that_is_there_from_the_start():
    stream = io.StringIO()
    console = Console(stream)
    with console.compiling("train step"):
        assert stream.getvalue() == "compiling train step ..."
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith(" s\n")
    with pytest.raises(RuntimeError), console.compiling("evaluation"):
        console.warn("slow")
        raise RuntimeError
    _, begun, warning, end = stream.getvalue().splitlines()
    assert begun == "compiling evaluation ..." and warning == "warning: slow"
    assert end.startswith("compiling evaluation ...") and end.endswith("s, failed")


def test_progress_off_a_terminal_is_a_line_every_so_many_steps():
    stream = io.StringIO()
    with Console(stream).progress(10, start=2, log_every=4) as progress:
        for step in range(3, 11):
            loss = math.nan if step == 5 else 2.0
            progress.update(step, loss=loss, lr=1e-3, grad_norm=0.5, tokens_per_s=1500, data_wait=0.25, seconds=2.0)
    lines = stream.getvalue().splitlines()
    assert [x.split("  ")[0] for x in lines] == ["step 3/10", "step 4/10", "step 8/10", "step 10/10"]
    assert lines[1].split("  ")[1:] == [
        "loss 2", "lr 1.00e-03", "grad norm 0.5000", "1.5k tokens/s", "data wait 25%", "ETA 0:12",
    ]  # fmt: skip
    assert lines[-1].endswith("ETA 0:00  1 skipped")  # and the mean loss is not nan
    assert "loss 2 " in lines[-1]


def test_progress_without_tokens_tells_no_speed():
    stream = io.StringIO()
    with Console(stream).progress(1, log_every=1) as progress:
        progress.update(1, loss=1.0, lr=1e-3, grad_norm=0.5, tokens_per_s=0.0, data_wait=0.0, seconds=2.0)
    assert "grad norm 0.5000  data wait 0%" in stream.getvalue()


def test_samples_are_matched_by_prompt():
    lines = said(("samples", BEFORE, AFTER)).splitlines()
    assert lines[:5] == [
        "answers to held-out prompts", "  1. prompt    1+1=", "     before    3", "     after     2", "     reference 2",
    ]  # fmt: skip
    assert "     after     -" in lines and "     before    -" in lines
    assert "before" not in said(("samples", [], AFTER))
    assert said(("samples", [], [])) == ""


def test_equal_prompts_are_matched_in_order():
    twice = [Answer("p", "a", "r"), Answer("p", "b", "r")]
    assert [(s.before, s.after) for s in pair(twice, twice[:1])] == [("a", "a"), ("b", None)]


def test_long_texts_are_cut_in_the_middle():
    out = said(("samples", [Answer("p", "a" * 600 + "b" * 600, "r")], []))
    assert (
        "a" * (MOST // 2) + " ... (500 characters left out) ... " + "b" * (MOST // 2) in out
        and "a" * (MOST // 2 + 1) not in out
    )


def test_the_comparison_takes_whole_lines_of_the_metrics_file():
    before = {"event": "eval", "step": 0, "rouge_l": 0.125, "loss": 3.0, "num_tokens": 99.0}
    after = {"event": "eval", "step": 20, "rouge_l": 0.25, "loss": 2.5, "perplexity": 12.18}
    assert [" ".join(x.split()) for x in said(("comparison", before, after)).splitlines()] == [
        "held-out results", "metric step 0 step 20 change", "held-out loss 3 2.5000 -0.5000",
        "rouge l 0.1250 0.2500 +0.1250", "perplexity - 12.1800 -",
    ]  # fmt: skip
    assert said(("comparison", {}, {})) == ""


def test_where_lines_up_the_paths():
    assert said(("where", {"run": "a", "report": "b"})) == "where everything is\n  run     a\n  report  b\n"


def test_a_quiet_console_says_nothing():
    for stream in (io.StringIO(), Screen()):
        console = Console(stream, width=80)
        console.quiet = True
        console.header(Run())
        console.memory(memory())
        console.samples(BEFORE, AFTER)
        with console.compiling("x"), console.progress(1) as progress:
            progress.update(1, loss=1.0, lr=1.0, grad_norm=1.0, tokens_per_s=1.0, data_wait=0.0)
        assert stream.getvalue() == ""


# On a terminal ---------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_trained_tokens_in_colour():
    out = said(("preview", [EXAMPLE]), stream=Screen())
    assert "green is trained" in out and "\x1b[32m" in out and "↵" in out and "[[" not in out


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = said(("preview", [EXAMPLE]), stream=Screen())
    assert "[[blue" in out and "\x1b[32m" not in out


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in said(("header", Run()), ("warn", "x"), stream=Screen())


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_bar_fits_the_terminal(width):
    stream = Screen()
    with Console(stream, width=width).progress(1000) as progress:
        progress.update(7, loss=2.0, lr=1e-3, grad_norm=0.5, tokens_per_s=1.0, data_wait=0.0, seconds=1.0)
        assert len(progress._draw().plain) < width or width == 40  # there the terminal cuts it
    assert "step 7/1000" in stream.getvalue() and ("data wait" in stream.getvalue()) == (width == 140)


def test_foreign_text_is_never_obeyed():
    evil = "\x1b[2Jgone\r\x07 [bold]kept[/bold] \u202eback\ud800"
    preview = PreviewExample(evil, (Span(evil, True), Span(evil, False)), 2, 1, trains_eos=True)
    calls = [("preview", [preview]), ("samples", [Answer(evil, evil, evil)], []), ("note", evil), ("warn", evil)]
    calls += [("where", {"run": evil})]
    plain, drawn = said(*calls), said(*calls, stream=Screen(), width=200)
    for out in (plain, drawn):
        assert "\x1b[2J" not in out and "\r" not in out and "\x07" not in out and "\u202e" not in out
        assert r"\x1b[2Jgone\r\x07 [bold]kept[/bold] \u202eback\ud800" in out
    assert "\x1b" not in plain


def test_a_stream_that_cannot_show_a_character_gets_its_escape():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream).note("caf\u00e9 \u4e2d")
    stream.flush()
    assert raw.getvalue() == rb"caf\xe9 \u4e2d" + b"\n"


# Tables ----------------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_as_a_model_file_counts_them():
    report = parameters()
    a, b = 4 * 32 * 4 + 64 * 4, 4 * 4 * 32 + 4 * 32
    per_layer = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    frozen = 2 * 96 * 32 + 32 + 4 * per_layer
    rows = {r.name: (r.tensors, r.entries, r.bytes, r.modules) for r in report.rows}
    assert rows == {
        "frozen": (3 + 4 * 9, frozen, 2 * frozen, ()), "fixed numbers": (4, 4, 16, ()),
        "lora_a": (5, a, 4 * a, ("q_proj", "down_proj")), "lora_b": (5, b, 4 * b, ("q_proj", "down_proj")),
    }  # fmt: skip
    assert (report.trainable, report.frozen, report.total) == (a + b, frozen + 4, a + b + frozen + 4)
    out = [x.split() for x in said(("parameters", report)).splitlines()]
    share = f"{100 * (a + b) / report.total:.2g}%"
    assert ["trainable", "10", f"{a + b:,}", share, size(4 * (a + b))[:-4], "KiB"] in out
    assert out[-1][:4] == ["all", "53", f"{report.total:,}", "100%"]


def test_memory_adds_up_to_what_the_compiler_said():
    report = memory()
    rows = {r.name: r.bytes // KIB for r in report.rows}
    assert rows == {
        "frozen weights": 4, "trained parameters": 1, "optimizer state": 2, "gradients": 1,
        "activations and workspace": 10, "batch": 2,
    }  # fmt: skip
    assert report.total == 20 * KIB  # arguments 9, temporaries 10, output without its alias 1
    assert report.verdict == "fits (20% of 100.0 KiB)"
    assert said(("memory", report)).splitlines()[-1] == "  fits (20% of 100.0 KiB)"


def test_memory_that_does_not_fit_names_the_settings_that_help():
    run = Run(train=Train(batch=12, accumulate=2), loader=Loader(max_length=300), compute=Compute(remat="dots"))
    report = memory(limit=10 * KIB, run=run)
    assert not report.fits
    assert report.verdict == (
        "does not fit (200% of 10.0 KiB): try compute.remat=full, train.accumulate=4, compute.dtype=bfloat16, "
        "loader.max_length=150"
    )
    assert "compute.remat" not in memory(limit=1, run=Run(compute=Compute(remat="full"))).verdict


def test_memory_before_compiling_and_of_an_unknown_device(monkeypatch):
    assert memory(compiled=None, batch_bytes=KIB).verdict.startswith("fits (9% of 100.0 KiB) before activations")
    monkeypatch.setattr("ftjax.report.memory.device_limit", lambda: None)
    assert memory(limit=None).verdict == "needs 20.0 KiB; the device does not say how much it has"


def test_a_container_bounds_the_memory(tmp_path):
    (tmp_path / "max").write_text("4096\n")
    assert host_memory(str(tmp_path / "max")) == 4096
    (tmp_path / "max").write_text("max\n")
    assert host_memory(str(tmp_path / "max")) == host_memory(str(tmp_path / "absent")) > 2**20


def test_bytes_are_those_of_one_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    leaves = [jax.ShapeDtypeStruct((16, 3), np.float32, sharding=s) for s in (split, whole, None)]
    assert device_bytes(leaves) == 4 * (2 * 3 + 16 * 3 + 16 * 3)


def test_a_table_as_markdown_escapes_its_bars():
    assert markdown(comparison({"a|b": 1.5}, {"a|b": 1.0})).splitlines() == [
        "| metric | before | after | change |", "|---|---:|---:|---:|", "| a\\|b | 1.5000 | 1 | -0.5000 |",
    ]  # fmt: skip


def test_numbers_as_people_read_them():
    assert [size(n) for n in (0, 1023, 1024, 6_187_008, 5 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.9 MiB",
        "5.0 TiB",
    ]
    assert [short(n) for n in (7, 999.6, 12_345, 2.5e6, 3e9)] == ["7", "1k", "12.3k", "2.5M", "3.0B"]
    assert [clock(s) for s in (0, 62, 3600 + 125)] == ["0:00", "1:02", "1:02:05"]
    assert [number(x) for x in (0.0, 3.0, 0.25, 1e-5, 123456.5)] == ["0", "3", "0.2500", "1.000e-05", "1.235e+05"]
    assert number(math.nan) == "nan" and percent(1, 0) == "0%" and percent(1, 300) == "0.33%"
    assert visible("a\tb\nc\u200b") == "a\tb\nc\\u200b"
    mean = Ema()
    assert math.isnan(mean.update(math.nan)) and mean.update(2.0) == 2.0 and mean.update(math.inf) == 2.0
    assert mean.update(4.0) == pytest.approx((0.09 * 2 + 0.1 * 4) / 0.19)
