"""Handle SIGTERM and SIGINT during training: finish the update, save a checkpoint and stop.

A second signal ends the run immediately. `wallx_jax.train` exits with EXIT_CODE, which tells a job scheduler that the
run can be resumed. Before training starts, when there is nothing to lose, `wallx_jax.train` ends at the first signal.
"""

import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallx_jax.training.sharding import replicated
from wallx_jax.utils.signals import EXIT_CODE, SIGNALS, Watch, say

__all__ = ["EXIT_CODE", "SIGNALS", "Interrupted", "StopRequest"]

# Schedulers and terminals signal both a process and its group: a signal that follows this soon is the same request.
SAME_S = 2.0


class Interrupted(RuntimeError):
    """Raised when a signal has stopped training, after a checkpoint was saved."""


class StopRequest(Watch):
    """Record SIGTERM and SIGINT while entered, instead of ending the process.

    Args:
        mesh: mesh of the run; all its processes stop together.
        on_second_signal: called on a second signal, more than SAME_S seconds after the first; not expected to return.

    Attributes:
        stopped: the last result of `reached`.
    """

    def __init__(self, mesh: Mesh, on_second_signal: Callable[[signal.Signals], None]):
        super().__init__(self._receive)
        self.stopped = False
        self._on_second_signal = on_second_signal
        self._received_at: float | None = None
        self._votes: jax.Array | None = None
        self._one_per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            say("interrupted: finishing the update, then saving a checkpoint; another signal ends the run at once")
        elif now - self._received_at > SAME_S:
            self._on_second_signal(number)

    def reached(self) -> bool:
        """Return whether to stop after this update; every process must call this once after every update.

        All processes stop after the same update, whichever of them received the signal: each one votes here and obeys
        the votes of the previous update, so that fetching them does not stall the device.
        """
        received = self._received_at is not None
        if jax.process_count() == 1:
            self.stopped = received
            return self.stopped
        earlier, mine = self._votes, np.array([received])
        ballot = jax.make_array_from_callback((self._one_per_device.mesh.size,), self._one_per_device, lambda _: mine)
        self._votes = self._any(ballot)
        self.stopped = earlier is not None and bool(earlier)
        return self.stopped
