"""XLA flags for tests, which compile much and compute little."""

import os
import subprocess
import sys

WANTED = (
    # Nothing is optimised.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Loops come from the older of XLA's two emitters for CPUs, which compiles twice as fast. Gone in jaxlib 0.12.
    "--xla_cpu_use_fusion_emitters=false",
)


def accepted(flags: tuple[str, ...]) -> str:
    """Those of `flags` that the installed XLA knows, as one string.

    XLA ends the process over an unknown flag, with a message that pytest's capturing swallows. So another process
    tries them first, together with XLA_FLAGS as found in the environment.

    Raises:
        RuntimeError: XLA rejects something else, such as a flag in the environment.
    """
    while True:
        environment = os.environ | {"XLA_FLAGS": " ".join((os.environ.get("XLA_FLAGS", ""), *flags))}
        # Creates the client as `jax.devices()` does, without the second that importing jax takes.
        probe = subprocess.run(
            [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"],
            capture_output=True,
            text=True,
            env=environment,
        )
        if probe.returncode == 0:
            return " ".join(flags)
        # "Unknown flags in XLA_FLAGS: --first=1 --second=2"
        known = tuple(flag for flag in flags if flag not in probe.stderr)
        if known == flags:
            raise RuntimeError(
                f"XLA does not start with XLA_FLAGS={environment['XLA_FLAGS']!r}:\n{probe.stderr[:1000]}"
            )
        flags = known


QUICK_COMPILE = accepted(WANTED)
