"""What a scanned layer keeps for its backward pass."""

from collections.abc import Callable

import jax


def checkpointed(body: Callable, remat: str) -> Callable:
    """`body` of a scan under the rematerialisation policy "full", "dots" or "none" (see Numerics)."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # A scan body is compiled once and cannot be merged with its recomputation, so no barrier is needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
