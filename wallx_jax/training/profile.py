"""A profiler trace of a few training steps, for XProf or for ui.perfetto.dev (its .trace.json.gz)."""

import logging

import jax

from wallx_jax.config.schema import LoopConfig

logger = logging.getLogger(__name__)


class ProfileWindow:
    """Traces `profile_active_iters` steps after the waiting and the warming ones, counted from where the run starts.

    A context: a run that ends within the window keeps what it has traced.
    """

    def __init__(self, loop: LoopConfig, start: int, total_steps: int):
        """`start`: steps done before this run. Warns where the run ends before the window."""
        self._folder, self._running = loop.profile_save_path, False
        self._first = start + loop.profile_wait_iters + loop.profile_warmup_iters + 1 if loop.profile else 0
        self._last = self._first + loop.profile_active_iters - 1
        if self._first > total_steps:
            logger.warning(
                "no profile: it would begin at step %d, after the last, %d; lower profile_wait_iters or "
                "profile_warmup_iters", self._first, total_steps
            )  # fmt: skip

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        """`result`: something the step worked out, which is waited for."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()
