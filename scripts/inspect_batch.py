"""Show exactly what the model is fed: the first training samples of a configuration, as text and as an image.

    python scripts/inspect_batch.py --config=configs/aloha.py --workdir=runs/inspect [--samples=4]

Takes the same settings as `python -m wallx_jax.train`. Writes batch.txt (prompt with placeholders collapsed, labels,
state and actions before and after normalization, masks) and batch.png (the resized images of each camera, in order).
No weights are read.
"""

import logging
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from wallx_jax.utils import extras

extras.require("train", __name__, __doc__)

from wallx_jax.config import resolve
from wallx_jax.config.command_line import launch
from wallx_jax.data.build import build_augment, cache_frames, split_datasets
from wallx_jax.data.datasets import open_datasets
from wallx_jax.data.pipeline import shuffled, training_dataset
from wallx_jax.dataset_check import preflight
from wallx_jax.dataset_check.sample import describe_actions, describe_inputs
from wallx_jax.evaluation import plots
from wallx_jax.training import init
from wallx_jax.utils.files import write_text

flags.DEFINE_integer(
    "samples", 4, "training samples to show of each dataset, in the order in which training meets them", 1
)


def main(config: ConfigDict) -> None:
    logging.getLogger("absl").setLevel(logging.WARNING)
    run = resolve(config)
    preflight.check_folders(run)
    specs = open_datasets(run)
    _, processors = init.plan_datasets(specs)

    inputs, actions, rows = [], [], []
    for dataset in map(cache_frames, split_datasets(specs, processors)):
        processor, data, seed = dataset.processor, dataset.settings.data, dataset.settings.loop.seed
        state_names, names = map(dataset.info.dim_names, (data.state_key, data.action_key))
        frames = shuffled(dataset.train, seed)
        fed = training_dataset(dataset.train, processor, seed, build_augment(dataset.settings))
        for i in range(flags.FLAGS.samples):
            raw, sample = frames[i], fed[i]
            inputs.append(describe_inputs(raw, sample, processor, state_names))
            actions.append(describe_actions(raw, sample, processor, names))
            titles = [f"{n}: {view}" for n, view in enumerate(processor.config.views, 1)]
            titles[0] = f"episode {raw.episode}, frame {raw.frame}: {raw.instruction}\n{titles[0]}"
            rows.append(list(zip(titles, sample.images, strict=True)))
    out = Path(specs[0].settings.loop.save_path)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"{seen}\n{done}" for seen, done in zip(inputs, actions, strict=True))
    write_text(out / "batch.txt", text + "\n")
    plots.image_grid(out / "batch.png", rows)
    print("\n\n".join(inputs))
    print(f"\n{len(inputs)} samples, with their actions, in {out / 'batch.txt'} and {out / 'batch.png'}")


if __name__ == "__main__":
    launch(main)
