"""What a layer keeps for its backward pass."""

from collections.abc import Callable

import jax


def checkpointed(body: Callable, remat: str, in_scan: bool) -> Callable:
    """`body` under the rematerialisation policy "full", "dots" or "none" (see Numerics)."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # The body of a scan is compiled once and cannot be merged with its recomputation, so it needs no barrier.
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_scan)
