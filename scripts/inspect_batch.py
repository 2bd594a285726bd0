"""Shows exactly what the model is fed: the first training samples of a configuration, as text and as a picture.

    python scripts/inspect_batch.py --config=configs/aloha.py --workdir=runs/inspect [--samples=4]

Takes the same settings as `python -m wallx_jax.train`. Writes batch.txt (prompt with placeholders collapsed, labels,
state and actions before and after normalisation, masks) and batch.png (the resized images of each camera, in order).
No weights are read.
"""

import logging
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from wallx_jax.command_line import launch
from wallx_jax.config import resolve
from wallx_jax.data.lerobot import read_info
from wallx_jax.data.mapping import check_dataset
from wallx_jax.data.pipeline import samples, shuffled
from wallx_jax.data.setup import build_augment, split_sources
from wallx_jax.evaluation import inspection, openloop, plots
from wallx_jax.training import start

flags.DEFINE_integer("samples", 4, "training samples to show, in the order in which training meets them", 1)


def main(config: ConfigDict) -> None:
    logging.getLogger("absl").setLevel(logging.WARNING)
    settings = resolve(config)
    info = read_info(settings.data.location, settings.data.revision, settings.data.download_videos)
    settings = check_dataset(settings, info)
    _, processor = start.plan(settings, info)
    source = split_sources(settings, info, processor.config)[0]
    state_names, names = (openloop.dim_names(info, key) for key in (settings.data.state_key, settings.data.action_key))

    inputs, actions, rows = [], [], []
    frames = shuffled(source, settings.loop.seed)
    fed = samples(source, processor, settings.loop.seed, build_augment(settings))
    for i in range(flags.FLAGS.samples):
        raw, sample = frames[i], fed[i]
        inputs.append(inspection.describe_inputs(raw, sample, processor, state_names))
        actions.append(inspection.describe_actions(raw, sample, processor, names))
        titles = [f"{n}: {view}" for n, view in enumerate(processor.config.views, 1)]
        titles[0] = f"episode {raw.episode}, frame {raw.frame}: {raw.instruction}\n{titles[0]}"
        rows.append(list(zip(titles, sample.images, strict=True)))
    out = Path(settings.loop.save_path)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"{seen}\n{done}" for seen, done in zip(inputs, actions, strict=True))
    (out / "batch.txt").write_text(text + "\n", encoding="utf-8")
    plots.pictures(out / "batch.png", rows)
    print("\n\n".join(inputs))
    print(f"\n{len(inputs)} samples, with their actions, in {out / 'batch.txt'} and {out / 'batch.png'}")


if __name__ == "__main__":
    launch(main)
