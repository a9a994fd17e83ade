"""Process settings that make the CPU backend fast: matrix products by oneDNN, temporary memory in large pages.

    from ftjax.parallel import xla_flags
    xla_flags.apply()                        # before the first use of a JAX device
    xla_flags.restart_with_large_pages()     # first thing of a program: the C library reads its setting at start only

Neither touches what the user has set, nor anything on GPU or TPU. `run.py` uses large pages always, and oneDNN where
`compute.onednn` asks for it: programs with its fusions cannot be kept in the compilation cache, so that every start
compiles anew. `benchmarks/results/cpu_step.md` has what each gives.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata

ONEDNN = ("--xla_cpu_use_onednn=true", "--xla_cpu_experimental_onednn_fusion_type=dot")
LARGE_PAGES = "glibc.malloc.hugetlb=1"

# XLA ends the process at a flag it does not know, so these go only to releases in which they were tried.
_TRIED = ((0, 11), (0, 13))


def flags(environ: Mapping[str, str], *, machine: str, jaxlib: str) -> str:
    """The value for XLA_FLAGS: what stands there, then ours where the user has said nothing of the same flag.

    Args:
      environ: the process environment.
      machine: as `platform.machine()`; oneDNN is built in on x86-64 only.
      jaxlib: version of jaxlib.
    """
    present = environ.get("XLA_FLAGS", "")
    release = tuple(int(part) for part in jaxlib.split(".")[:2])
    if machine.lower() not in ("x86_64", "amd64") or not _TRIED[0] <= release < _TRIED[1]:
        return present
    named = {word.split("=")[0] for word in present.split()}
    # Both flags mean something together only: a user who sets one decides about both.
    if named & {flag.split("=")[0] for flag in ONEDNN}:
        return present
    return " ".join(filter(None, (present, *ONEDNN)))


def apply() -> None:
    """Sets XLA_FLAGS in this process. XLA reads it when the first device is asked for."""
    value = flags(os.environ, machine=platform.machine(), jaxlib=metadata.version("jaxlib"))
    if value:
        os.environ["XLA_FLAGS"] = value


def large_pages(environ: Mapping[str, str], *, libc: str) -> dict[str, str]:
    """What to add to the environment of a process so that its large allocations use large pages; empty if nothing.

    A training step asks for hundreds of megabytes anew each time; in pages of 4 KiB the kernel spends about a fifth of
    a small model's step on handing them out.

    Args:
      environ: the process environment; a user's own GLIBC_TUNABLES stay as they are.
      libc: as `platform.libc_ver()[0]`.
    """
    if libc != "glibc" or "GLIBC_TUNABLES" in environ:
        return {}
    return {"GLIBC_TUNABLES": LARGE_PAGES}


def restart_with_large_pages() -> None:
    """Starts this program again in the same process, with `large_pages` in its environment, unless it is there already."""
    more = large_pages(os.environ, libc=platform.libc_ver()[0])
    if more and sys.orig_argv:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})
