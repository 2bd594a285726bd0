"""Model FLOPs: against the products that JAX traces, against XLA's own count, and against published peaks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark import random_batch
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from wallx_jax.config import default_config, resolve
from wallx_jax.config.schema import MeshConfig
from wallx_jax.models import scan
from wallx_jax.models.config import PRESETS, TINY, WallXConfig
from wallx_jax.models.params import abstract_params
from wallx_jax.training import flops, sharding
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.step import Objective, batch_sums
from wallx_jax.utils import tree

MODEL = TINY.replace(
    vision={"depth": 3, "hidden_size": 128, "intermediate_size": 192, "fullatt_block_indexes": (1,)},
    text={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "mrope_section": (4, 6, 6),
          "num_attention_heads": 4},
    numerics={"remat": "none"},
)  # fmt: skip
MODEL = MODEL.replace(vision={"out_hidden_size": 128})


def a_batch(model: WallXConfig, window: int):
    batch = random_batch(model, 2)
    return dataclasses.replace(batch, labels=np.zeros((2, window), np.int32))


def settings(**changes):
    c = default_config()
    c.pretrained_wallx_path, c.repo_id, c.save_path = "model", "lerobot/aloha_mobile_cabinet", "out"
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return resolve(c).optim


def loss(trained, frozen, batch, model, use_flow):
    noise, time = jnp.zeros(batch.actions.shape), jnp.full(len(batch.actions), 0.5)
    sums = batch_sums(tree.merge(trained, frozen), batch, noise, time, model, Objective(use_flow))
    return jnp.sum(sums.cross_entropy) + jnp.sum(sums.flow)


def traced_flops(jaxpr) -> int:
    """2 x M x N x K of every dot_general of a jaxpr, scans multiplied out; of the vision blocks, whose attention is
    over windows or over whole frames, as many of each as the tower has."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "cond":
            windowed, full = (traced_flops(branch.jaxpr) for branch in eqn.params["branches"])
            total += windowed + (full - windowed) * len(MODEL.vision.fullatt_block_indexes) / MODEL.vision.depth
            continue
        for inner in jaxprs_in_params(eqn.params):
            total += traced_flops(inner) * eqn.params.get("length", 1)
    return total


def forward_flops(model, sample, use_flow: bool = True) -> int:
    return sum(product.flops for product in flops.products(model, sample, use_flow))


@pytest.mark.parametrize(
    ("changes", "window", "use_flow"),
    [
        ({}, 0, True),
        ({}, 5, True),
        ({"use_fast_tokenizer": True, "action_tokenizer_path": "fast"}, 9, False),
        ({"freeze_vlm": True}, 0, True),
        ({"freeze_vlm": True, "train_action_heads": False}, 0, True),
        ({"lora__rank": 4}, 0, True),
        ({"lora__rank": 4, "lora__targets": ("decoder/layers/attn/", "vision/")}, 5, True),
    ],
)
def test_counts_the_products_that_jax_traces(changes, window, use_flow):
    optim = settings(**changes)
    model = dataclasses.replace(MODEL, lora=optim.lora)
    batch = a_batch(model, window)
    trained, frozen = tree.split(abstract_params(model), make_optimizer(optim, 10).is_trainable)

    def forward(trained, frozen, batch):
        return loss(trained, frozen, batch, model, use_flow)

    sample = jax.tree.map(lambda x: x[0], batch)
    traced = traced_flops(jax.make_jaxpr(forward)(trained, frozen, batch).jaxpr)
    assert 2 * forward_flops(model, sample, use_flow) == pytest.approx(traced, rel=1e-3)
    gradients = jax.make_jaxpr(jax.grad(forward))(trained, frozen, batch).jaxpr
    needed, _ = dce_jaxpr(gradients, [True] * len(gradients.outvars))  # as XLA will
    traced = traced_flops(needed)
    assert 2 * flops.update_flops(model, sample, make_optimizer(optim, 10).is_trainable, use_flow) == pytest.approx(
        traced, rel=0.02
    )


def test_xla_counts_the_same():
    """Layers apart, since XLA counts the body of a loop once; labels throughout, since the last layer leaves out what
    nobody asks for. XLA adds what is no product: norms, softmax, rotation."""
    batch = a_batch(MODEL, random_batch(MODEL, 1).tokens.shape[1] - 1)
    params = jax.eval_shape(scan.unstack_layers, abstract_params(MODEL))
    compiled = jax.jit(lambda params, batch: loss(params, {}, batch, MODEL, True)).lower(params, batch).compile()
    ours = 2 * forward_flops(MODEL, jax.tree.map(lambda x: x[0], batch))
    assert ours < compiled.cost_analysis()["flops"] < 1.12 * ours


def test_a_full_update_of_the_published_model_costs_three_forward_passes():
    model = PRESETS["wall_oss_3b"]
    sample = jax.tree.map(lambda x: x[0], a_batch(model, 0))
    forward = forward_flops(model, sample)
    assert flops.update_flops(model, sample, make_optimizer(settings(), 10).is_trainable) == pytest.approx(
        3 * forward, rel=0.002
    )
    # 2 FLOPs x 3.1 B decoder weights x 253 prompt tokens are the bulk of it.
    assert 1.6e12 < forward < 2.6e12


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", 209), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("NVIDIA L40", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks(kind, peak):
    assert flops.peak_tflops(kind) == peak


def test_rates_are_per_device(monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    assert flops.rates(4e12, mesh) == {"tflops_per_device": 2.0}
    monkeypatch.setattr(flops, "peak_tflops", lambda kind: 8.0)
    assert flops.rates(4e12, mesh) == {"tflops_per_device": 2.0, "mfu": 0.25}
