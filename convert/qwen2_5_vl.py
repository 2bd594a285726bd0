"""Converts a Qwen2.5-VL model directory, in the old or the new naming, to a checkpoint.

    python convert/qwen2_5_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct --output checkpoints/qwen2.5-vl-3b
    python convert/qwen2_5_vl.py --model DIR --output DIR

Streams the tensors, so that memory stays below 2 GiB whatever the model's size. Every piece is read back and compared.
OUTPUT appears when it is complete; a run that is interrupted leaves nothing that loads. Training
(--config.pretrained_wallx_path=OUTPUT) initialises the action side; scripts/vqa.py and convert/export.py take it too.
"""

import argparse

from wallx_jax.checkpoints import command
from wallx_jax.checkpoints.from_pytorch import convert_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with config.json and safetensors, or hub repo id")
    parser.add_argument("--output", required=True, help="checkpoint directory to make")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    arguments = parser.parse_args()
    print(f"wrote {convert_model(arguments.model, arguments.output, acts=False, revision=arguments.revision)}")


if __name__ == "__main__":
    command.run(main)
