"""SIGTERM and SIGINT during training: the update is finished, a checkpoint saved, the run stopped.

A second signal ends the run at once. Whoever runs jobs tells by the exit code of `wallx_jax.train` that the run can be
resumed: it is EXIT_CODE. Before training, where nothing can be lost, `wallx_jax.train` ends at the first one.
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

SAME_S = 2.0  # a scheduler and a terminal signal a process and its group: what comes so soon after is the same request


class Interrupted(RuntimeError):
    """Training was stopped by a signal, after a checkpoint had been saved."""


class StopRequest(Watch):
    """While entered, remembers SIGTERM and SIGINT instead of ending the process.

    Args:
        mesh: of the run, whose processes stop together.
        give_up: called when a second signal comes, more than SAME_S after the first; not expected to return.

    Attributes:
        stopped: whether `reached` has told the run to stop.
    """

    def __init__(self, mesh: Mesh, give_up: Callable[[signal.Signals], None]):
        super().__init__(self._receive)
        self.stopped = False
        self._give_up = give_up
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
            self._give_up(number)

    def reached(self) -> bool:
        """Whether to stop here; to be called once after every update, by every process.

        Many processes stop after the same update, whichever of them got the signal: each votes here and acts on the
        votes that were cast one update earlier, so that fetching them does not hold up the device.
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
