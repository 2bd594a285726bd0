"""Export a checkpoint to a PyTorch model directory.

    python convert/export.py --checkpoint runs/aloha --output exported
    python convert/export.py --checkpoint runs/aloha --output exported-vlm --layout qwen2_5_vl --dtype bfloat16

--layout wall_x: upstream's layout (config.json, model.safetensors, tokenizer and processor files, norm_stats.json), as
read by its loader and by lerobot's wall_x policy. --layout qwen2_5_vl: only the vision-language part, for transformers.
Tensors are streamed, and the result is compared with the checkpoint. OUTPUT appears only when it is complete.
"""

import argparse

from wallx_jax.checkpoints import command
from wallx_jax.checkpoints.to_pytorch import export_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, or run directory for its newest one")
    parser.add_argument("--output", required=True, help="model directory to make")
    parser.add_argument("--layout", choices=("wall_x", "qwen2_5_vl"), default="wall_x")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float16", "float32"),
        default="keep",
        help="keep: as in the checkpoint; a converted one gets the dtypes back that it came with",
    )
    parser.add_argument(
        "--shard-gb",
        type=float,
        help="maximum shard size in GB, with an index; default: one file, as Wall-X's loaders require",
    )
    arguments = parser.parse_args()
    shard_bytes = None if arguments.shard_gb is None else int(arguments.shard_gb * 1e9)
    output = export_model(
        arguments.checkpoint,
        arguments.output,
        layout=arguments.layout,
        dtype=arguments.dtype,
        shard_bytes=shard_bytes,
    )
    print(f"wrote {output}")


if __name__ == "__main__":
    command.run(main)
