"""Ask a checkpoint about images or a video: visual questions, step-by-step reasoning, the next subtask.

    python scripts/vqa.py --model Qwen/Qwen2.5-VL-3B-Instruct --image photo.png --question "What is on the table?"
    python scripts/vqa.py --model DIR --video clip.mp4 --fps 2 --question "What happens? Think step by step."

The model is a wallx_jax checkpoint or run directory, a Wall-X or Qwen2.5-VL directory, or a hub repo id.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.data.video import read_video
from wallx_jax.inference.load import load_vlm
from wallx_jax.utils.errors import run_main
from wallx_jax.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub repo id")
    parser.add_argument("--image", type=Path, action="append", default=[], help="image file; may be given repeatedly")
    parser.add_argument("--video", type=Path, help="video file")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second to take of the video")
    parser.add_argument("--question", required=True)
    parser.add_argument("--system", help="system message; default: the chat template's")
    parser.add_argument("--max-tokens", type=int, default=512, help="room for the answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy decoding")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing, above temperature 0")
    parser.add_argument("--json", type=Path, help="also write answer and timings here")
    arguments = parser.parse_args()

    content = [{"type": "image", "image": _read_image(file)} for file in arguments.image]
    if arguments.video:
        frames, fps = read_video(arguments.video, arguments.fps)
        content.append({"type": "video", "video": frames, "fps": fps})
    content.append({"type": "text", "text": arguments.question})
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    answer = load_vlm(arguments.model).chat(
        [*messages, {"role": "user", "content": content}],
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    print(answer.text)
    if not answer.finished:
        print(f"[cut off after {arguments.max_tokens} tokens; raise --max-tokens]")
    if arguments.json:
        figures = {"text": answer.text, "tokens": answer.tokens, "finished": answer.finished,
                   "timings_ms": answer.timings_ms}  # fmt: skip
        write_text(arguments.json, json.dumps(figures, indent=2) + "\n")


def _read_image(file: Path) -> Image.Image:
    try:
        return Image.open(file).convert("RGB")
    except OSError as error:  # missing file, or not an image
        raise ValueError(f"--image {file}: {error}") from None


if __name__ == "__main__":
    run_main(main)
