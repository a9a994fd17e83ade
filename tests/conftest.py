"""Settings of the whole suite: 8 virtual CPU devices, strict promotion, a compilation cache, tiny models.

Warnings are errors (setup.cfg). XLA's own complaints about resharding go to stderr, where `xla_complaints` finds them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/ftjax/test-xla").expanduser()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser):
    parser.addoption("--matrix", default="cover", choices=("cover", "full"), help="cells of test_matrix to run")


@pytest.fixture
def shared():
    """Real data for development, beside the checkout; absent elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("the development data is not here")
    return SHARED
