"""Convert a Qwen2.5-VL model directory (old or new tensor names) to a checkpoint.

    python convert/qwen2_5_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct --output checkpoints/qwen2.5-vl-3b
    python convert/qwen2_5_vl.py --model DIR --output DIR

Tensors are streamed, so memory stays below 2 GiB for any model size, and everything written is read back and compared.
OUTPUT appears only when it is complete; an interrupted conversion leaves nothing that loads. Training
from OUTPUT (--config.pretrained_wallx_path=OUTPUT) initializes the action side randomly; scripts/vqa.py and
convert/export.py also accept OUTPUT.
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
    checkpoint = convert_model(arguments.model, arguments.output, has_action_head=False, revision=arguments.revision)
    print(f"wrote {checkpoint}")


if __name__ == "__main__":
    command.run(main)
