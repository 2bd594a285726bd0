"""A strict environment for every test: CPU, four virtual devices, exact float32 products, no network."""

import gc
import os
import socket
from pathlib import Path

from helpers import xla_flags

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4", xla_flags.QUICK_COMPILE)
)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # nothing is written into the user's cache, also by subprocesses
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warning when worker processes fork

import hypothesis
import jax
import pytest
from absl import flags
from helpers import global_state, synthetic

jax.config.update("jax_default_matmul_precision", "highest")
# The same examples at every run; `pytest --hypothesis-profile=default` draws new ones.
hypothesis.settings.load_profile("ci")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags


def _leaves_no_trace():
    before = global_state.snapshot()
    yield
    changes = global_state.restore(before)
    assert not changes, "left behind in this process:\n" + "\n".join(changes)


# What one test leaves behind makes another fail, depending on their order. Fixtures of a module are set up in its first
# test, and what they leave behind shows at its end.
leaves_no_trace = pytest.fixture(_leaves_no_trace, autouse=True)
module_leaves_no_trace = pytest.fixture(_leaves_no_trace, autouse=True, scope="module")


@pytest.fixture
def restored_state():
    """For tests that run a program in this process, which sets up logging and flags for itself."""
    with global_state.restored():
        yield


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections leave the machine for nobody: a test that needs the network fails where it asks for it."""
    patch = pytest.MonkeyPatch()
    real_connect = socket.socket.connect
    real_lookup = socket.getaddrinfo

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network: connection to {address}")
        return real_connect(self, address)

    def lookup(host, *args, **kwargs):
        if host not in (None, "", "127.0.0.1", "::1", "localhost"):
            raise socket.gaierror(f"tests have no network: lookup of {host}")
        return real_lookup(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", connect)
    patch.setattr(socket, "getaddrinfo", lookup)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Forgets the compiled programs of a module. Each takes some memory maps, of which Linux gives a process 65,530;
    beyond them XLA cannot compile and the process dies."""
    yield
    jax.clear_caches()
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:  # what takes the time is to collect
        gc.collect()


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A LeRobot v3.0 dataset on disk: see helpers/synthetic.py. Read-only; copy it to break it."""
    return synthetic.write_dataset(tmp_path_factory.mktemp("lerobot") / "synthetic")


@pytest.fixture(scope="session")
def dataset_info(dataset_dir):
    from wallx_jax.data.lerobot import read_info

    return read_info(dataset_dir)
