"""Record a profiler trace of a few training steps, for XProf or ui.perfetto.dev (open its .trace.json.gz)."""

import logging

import jax

from wallx_jax.config.schema import LoopConfig

logger = logging.getLogger(__name__)


class ProfileWindow:
    """Trace `profile_active_iters` steps after `profile_wait_iters` + `profile_warmup_iters` steps of this run.

    As a context manager, it also writes the trace of a run that ends within the window.
    """

    def __init__(self, loop: LoopConfig, start: int, total_steps: int):
        """Set up the window; warn if the run ends before it begins.

        Args:
            loop: loop config with the profile settings.
            start: number of steps done before this run.
            total_steps: last step of the run.
        """
        self._folder, self._running = loop.profile_save_path, False
        self._first = start + loop.profile_wait_iters + loop.profile_warmup_iters + 1 if loop.profile else 0
        self._last = self._first + loop.profile_active_iters - 1
        if self._first > total_steps:
            logger.warning(
                "no profile: it would begin at step %d, after the last, %d; lower profile_wait_iters or "
                "profile_warmup_iters", self._first, total_steps
            )  # fmt: skip

    def before(self, step: int) -> None:
        """Start tracing before the first step of the window."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        """Stop tracing after the last step of the window.

        Args:
            step: the step that was just dispatched.
            result: an output of the step, which is waited for before the trace is written.
        """
        if self._running and step == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
