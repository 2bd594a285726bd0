"""SIGTERM and SIGINT during training: the update is finished, a checkpoint saved, the run stopped.

A second signal ends the process at once. Whoever runs jobs tells by the exit code of `wallx_jax.train` that the run
can be resumed: it is EXIT_CODE.
"""

import os
import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallx_jax.training.sharding import replicated

EXIT_CODE = os.EX_TEMPFAIL  # 75: nothing is wrong, try again later
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTE = b"interrupted: finishing the update, then saving a checkpoint; another signal ends the process at once\n"


class Interrupted(RuntimeError):
    """Training was stopped by a signal, after a checkpoint had been saved."""


class StopRequest:
    """While entered, remembers SIGTERM and SIGINT instead of ending the process; afterwards handlers are as before.

    Signals that were ignored before (nohup) stay ignored. Python delivers signals to the main thread only, between
    two of its instructions; entered in another thread this changes nothing.

    `stopped`: whether `reached` has told the run to stop.
    """

    def __init__(self, mesh: Mesh):
        self.stopped = False
        self._received = False
        self._previous: dict[signal.Signals, object] = {}
        self._votes: jax.Array | None = None
        self._one_per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python does not know

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        for known in self._previous:
            signal.signal(known, signal.SIG_DFL)
        os.write(2, _NOTE)  # print may be what was interrupted

    def reached(self) -> bool:
        """Whether to stop here; to be called once after every update, by every process.

        Many processes stop after the same update, whichever of them got the signal: each votes here and acts on the
        votes that were cast one update earlier, so that fetching them does not hold up the device.
        """
        if jax.process_count() == 1:
            self.stopped = self._received
            return self.stopped
        earlier, mine = self._votes, np.array([self._received])
        ballot = jax.make_array_from_callback((self._one_per_device.mesh.size,), self._one_per_device, lambda _: mine)
        self._votes = self._any(ballot)
        self.stopped = earlier is not None and bool(earlier)
        return self.stopped
