"""One update: non-finite losses, schedule, groups, sharding rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_step import HORIZON, OPTIM, SMALL, leaves, random_batch

from wallx_jax.config.schema import MeshConfig
from wallx_jax.data.batch import Batch, EvalBatch
from wallx_jax.models.config import PRESETS, LoraConfig
from wallx_jax.models.params import abstract_params, from_params, init_params
from wallx_jax.training import sharding
from wallx_jax.training.loop import Steps, averages, validate
from wallx_jax.training.optimizer import make_optimizer
from wallx_jax.training.state import create_state
from wallx_jax.training.step import Objective, frame_noise_and_time, learning_rates, make_eval_step, make_train_step
from wallx_jax.training.stochastic_rounding import stochastic
from wallx_jax.utils import tree


def held_out(batch: Batch, first: int = 0) -> EvalBatch:
    """Frames `first` and on of a dataset, all counted."""
    size = len(batch.tokens)
    return EvalBatch(batch, frame=np.arange(first, first + size, dtype=np.uint32), counted=np.ones(size, bool))


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_train_step(SMALL, make_optimizer(OPTIM, 10), Objective(), seed=0))


@pytest.fixture(scope="module")
def state():
    return create_state(init_params(SMALL, 0), make_optimizer(OPTIM, 10))


@pytest.mark.medium
def test_a_non_finite_update_is_left_out_and_counted(step, state):
    good, bad = random_batch((1, 2)), random_batch((1, 2))
    bad = dataclasses.replace(bad, actions=bad.actions + np.float32("nan"))
    after, metrics = step(state, good)
    skipped, bad_metrics = step(after, bad)
    assert bool(metrics["finite"]) and not bool(bad_metrics["finite"])
    assert (int(skipped.step), int(skipped.skipped)) == (2, 1)
    assert int(skipped.updates) == int(skipped.opt_state[-1].count) == 1, "the schedules' count"
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (skipped.params, skipped.opt_state))
    _, next_metrics = step(skipped, good)
    assert float(next_metrics["learning_rate"]) == pytest.approx(5e-4), "the schedule counts updates, not batches"


@pytest.mark.medium
def test_loss_falls_and_noise_follows_seed_and_step(step, state):
    batch, losses, current = random_batch((1, 2)), [], state
    for _ in range(30):
        current, metrics = step(current, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    again, metrics = step(state, batch)
    assert float(metrics["loss"]) == losses[0]
    other = jax.jit(make_train_step(SMALL, make_optimizer(OPTIM, 10), Objective(), seed=1))(state, batch)[1]
    assert float(other["loss"]) != losses[0]


@pytest.mark.medium
def test_accumulation_weighs_labels_not_micro_batches():
    """Micro-batches with different numbers of labels: the mean is over all labels, as in one batch."""
    step = jax.jit(make_train_step(SMALL, make_optimizer(OPTIM, 10), Objective(use_flow=False), seed=0))
    state = create_state(init_params(SMALL, 0), make_optimizer(OPTIM, 10))
    whole = random_batch((1, 4), labels=5)
    whole.labels[0, :2, 1:] = -100
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[2:]), whole)
    a, b = step(state, whole)[1], step(state, split)[1]
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-4)
    assert "flow_loss" not in a


def fast_batch(action_labels: bool = True) -> Batch:
    """[1, 4] samples with 5 labels each, of which tokens 7 to 9 are actions, or none are."""
    batch = random_batch((1, 4), labels=5)
    rng = np.random.default_rng(1)
    batch.labels[...] = rng.integers(7, 10, batch.labels.shape) if action_labels else 11
    batch.labels[0, 0, 1:] = -100
    return batch


@pytest.mark.medium
def test_action_accuracy_is_that_of_greedy_prediction():
    """Sums and counts: micro-batches and devices change nothing; a batch without action tokens has no accuracy."""
    objective = Objective(use_flow=False, action_ids=(7, 10))
    step = jax.jit(make_train_step(SMALL, make_optimizer(OPTIM, 10), objective, seed=0))
    state, batch = create_state(init_params(SMALL, 0), make_optimizer(OPTIM, 10)), fast_batch()
    for _ in range(12):
        state, _ = step(state, batch)
    hits, count = step(state, batch)[1]["action_accuracy"]
    assert float(count) == 16

    @jax.jit
    def say(params, rows):
        net = from_params(SMALL, params)
        return net.logits(net.forward(net.embed_batch(rows)).hidden[:, -6:-1])

    rows = jax.tree.map(lambda x: x[0], batch)
    said = np.asarray(say(state.params, rows)).argmax(-1)
    assert 0 < float(hits) == (said == rows.labels).sum() < 16, "a test of both outcomes"

    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[2:]), batch)
    assert step(state, split)[1]["action_accuracy"] == (hits, count)
    sums, counts = jax.jit(make_eval_step(SMALL, objective, seed=0))(state.params, held_out(rows))
    assert (sums.action_correct, counts.action_correct) == (hits, count)

    window = [jax.device_get(step(state, b)[1]) for b in (batch, fast_batch(action_labels=False))]
    assert averages(window)["action_accuracy"] == pytest.approx(float(hits) / 16)
    assert "action_accuracy" not in averages(window[1:])


def test_flow_runs_measure_no_accuracy(step, state):
    assert "action_accuracy" not in step(state, random_batch((1, 2)))[1]


def test_padded_actions_can_be_left_out(state):
    """What the data has past an episode's end then changes no loss; and the mean is over what is left."""
    masked = jax.jit(make_eval_step(SMALL, Objective(mask_padded_actions=True), seed=0))
    plain = jax.jit(make_eval_step(SMALL, Objective(), seed=0))
    batch = random_batch((2,))
    batch.action_is_pad[0, 1:] = True
    sums, counts = masked(state.params, held_out(batch))
    assert (float(counts.flow), float(plain(state.params, held_out(batch))[1].flow)) == (4 * 6, 6 * 6)
    nothing = dataclasses.replace(batch, action_is_pad=np.zeros_like(batch.action_is_pad))
    parts = [
        masked(state.params, held_out(dataclasses.replace(batch, action_is_pad=batch.action_is_pad ^ flip)))[0].flow
        for flip in (False, True)
    ]
    whole = plain(state.params, held_out(batch))[0].flow
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5) and 0 < float(parts[0]) < float(whole)
    assert float(masked(state.params, held_out(nothing))[0].flow) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.medium
def test_losses_of_each_dataset(step, state):
    """They are the parts of the one loss; a dataset without samples in a batch has none."""
    mixed = Objective(datasets=("a", "b", "c"))
    batch = dataclasses.replace(random_batch((1, 4)), dataset=np.array([[0, 1, 0, 0]], np.int32))
    mixed_step = jax.jit(make_train_step(SMALL, make_optimizer(OPTIM, 10), mixed, seed=0))
    after, metrics = jax.device_get(mixed_step(state, batch))
    plain_after, plain = jax.device_get(step(state, dataclasses.replace(batch, dataset=None)))
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for path, x in leaves(after.params).items():
        np.testing.assert_allclose(x, leaves(plain_after.params)[path], atol=1e-6, err_msg=path)
    (sum_a, count_a), (sum_b, count_b) = metrics["flow_loss/a"], metrics["flow_loss/b"]
    assert (count_a, count_b) == (3 * 18, 18) and metrics["flow_loss/c"] == (0, 0)
    assert (sum_a + sum_b) / 72 == pytest.approx(plain["flow_loss"], rel=1e-5)
    scalars = averages([metrics])
    assert scalars["flow_loss/b"] == pytest.approx(sum_b / 18)
    assert not {"flow_loss/c", "cross_entropy_loss/a"} & set(scalars), "nothing to divide by"

    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[2:]), batch)
    accumulated = mixed_step(state, split)[1]
    assert float(accumulated["flow_loss/a"][0]) == pytest.approx(float(sum_a), rel=1e-5)

    # The mask takes b's samples out of the numerator of a run with one dataset.
    rows = jax.tree.map(lambda x: x[0], batch)
    evaluate = jax.jit(make_eval_step(SMALL, mixed, seed=0))
    sums, counts = evaluate(state.params, held_out(rows))
    alone = dataclasses.replace(rows, action_mask=rows.action_mask * (rows.dataset == 0)[:, None, None])
    plain_evaluate = jax.jit(make_eval_step(SMALL, Objective(), seed=0))
    only_a = plain_evaluate(state.params, held_out(dataclasses.replace(alone, dataset=None)))[0].flow
    assert float(sums.flow[0]) == pytest.approx(float(only_a), rel=1e-5)
    assert counts.flow.tolist() == [54, 18, 0]

    poisoned = dataclasses.replace(rows, actions=np.where((rows.dataset == 1)[:, None, None], np.nan, rows.actions))
    sums, _ = evaluate(state.params, held_out(poisoned))
    assert np.isnan(sums.flow[1]) and float(sums.flow[0]) == pytest.approx(float(only_a), rel=1e-5)


@pytest.mark.medium
def test_validation_noise_belongs_to_the_frame(state):
    evaluate = jax.jit(make_eval_step(SMALL, Objective(), seed=3))
    batch = random_batch((2,))
    first, again, other = (evaluate(state.params, held_out(batch, i))[0].flow for i in (0, 0, 1))
    assert float(first) == float(again) != float(other)
    noise, time = frame_noise_and_time(held_out(batch), SMALL, 3)
    assert float(np.abs(noise[0] - noise[1]).min()) > 0 and time[0] != time[1]
    of_another = held_out(dataclasses.replace(batch, dataset=np.array([0, 1], np.int32)))
    there, _ = frame_noise_and_time(of_another, SMALL, 3)
    np.testing.assert_array_equal(there[0], noise[0])
    assert (there[1] != noise[1]).all()


OBJECTIVES = {
    "flow": Objective(),
    "flow without padded actions": Objective(mask_padded_actions=True),
    "fast": Objective(use_flow=False, action_ids=(7, 8)),
    "several datasets": Objective(datasets=("a", "b")),
}


@pytest.mark.medium
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_validation_is_the_same_in_any_batches_and_on_any_mesh(state, objective):
    """Every frame once, each with its own noise, whatever the batch size, the order or the devices."""
    count, labels = 5, 0 if objective.use_flow else 4
    frames = random_batch((count,), labels=labels)
    frames.action_is_pad[2, 1:] = True
    if objective.datasets:
        frames = dataclasses.replace(frames, dataset=np.array([0, 1, 0, 0, 1], np.int32))

    def measure(size: int, order=range(count), devices: int = 1):
        mesh = sharding.make_mesh(MeshConfig(1, devices, 1), jax.devices()[:devices])
        order, batches = list(order), []
        for start in range(0, count, size):
            rows = order[start : start + size]
            rows, counted = rows + rows[:1] * (size - len(rows)), np.arange(size) < len(rows)
            rows_of = jax.tree.map(lambda x, rows=rows: x[rows], frames)
            batches.append(EvalBatch(rows_of, frame=np.array(rows, np.uint32), counted=counted))
        evaluate = jax.jit(make_eval_step(SMALL, objective, seed=3))
        params = jax.device_put(state.params, sharding.replicated(mesh))
        return validate(Steps(None, evaluate, mesh, 0, objective.datasets), params, batches, 1.0)

    alone = measure(1)
    assert alone["val_loss"] > 0
    for other in (measure(2), measure(3, order=[4, 1, 0, 3, 2]), measure(8, devices=4)):
        assert other == pytest.approx(alone, rel=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("fast", [False, True])
def test_validation_is_the_mean_of_what_each_frame_gives_alone(state, fast):
    frames, objective = random_batch((5,), labels=4 if fast else 0), Objective(use_flow=not fast)
    frames.labels[3] = -100  # nothing to be said
    total = count = 0
    for i in range(5):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], frames)
        net = from_params(SMALL, state.params)
        if fast:
            logits = net.logits(net.forward(net.embed_batch(one)).hidden[:, -5:-1])
            said = np.flatnonzero(one.labels[0] != -100)
            total -= jax.nn.log_softmax(logits)[0, said, one.labels[0, said]].sum()
            count += len(said)
            continue
        noise, time = frame_noise_and_time(held_out(one, i), SMALL, 3)
        x = (1 - time[:, None, None]) * noise + time[:, None, None] * one.actions
        hidden = net.forward(net.embed_batch(one), (x, one.action_mask, time)).hidden[:, -HORIZON:]
        error = np.square(net.action.velocity(hidden) - (one.actions - noise)) * one.action_mask
        total, count = total + error.sum(), count + error.size
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    evaluate = jax.jit(make_eval_step(SMALL, objective, seed=3))
    rows = [held_out(jax.tree.map(lambda x, s=s: x[s : s + 2], frames), s) for s in (0, 2)]
    filled = held_out(jax.tree.map(lambda x: x[[4, 4]], frames), 4)
    rows.append(dataclasses.replace(filled, counted=np.array([True, False])))
    scalars = validate(Steps(None, evaluate, mesh, 0), state.params, rows, 1.0)
    assert scalars["val_loss"] == pytest.approx(float(total) / count, rel=1e-5)


def test_every_parameter_and_moment_has_a_place_on_the_mesh():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    config = dataclasses.replace(PRESETS["wall_oss_3b"], lora=LoraConfig(rank=8, targets=("",)))
    abstract = jax.eval_shape(lambda p: create_state(p, make_optimizer(OPTIM, 10)), abstract_params(config))
    placed = sharding.shardings(abstract, mesh)
    cut = whole = 0
    for leaf, where in zip(jax.tree.leaves(abstract), jax.tree.leaves(placed), strict=True):
        shard = where.shard_shape(leaf.shape)
        if np.prod(shard, dtype=int) * 4 == np.prod(leaf.shape, dtype=int):
            cut += leaf.size
        else:
            whole += leaf.size
    assert cut / (cut + whole) > 0.99
    with pytest.raises(ValueError, match="no sharding rule for parameter a/b"):
        sharding.param_spec("a/b", (2, 2), mesh)


def test_mesh_sizes_must_fit():
    assert dict(sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=1)).shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    for wrong in (MeshConfig(data=3, fsdp=1, tensor=1), MeshConfig(data=-1, fsdp=3, tensor=1)):
        with pytest.raises(ValueError, match="does not fit 4 devices"):
            sharding.make_mesh(wrong)


def test_stochastic_rounding_is_right_on_average():
    x = jnp.asarray([1 + 2**-9, -(1 + 2**-9), 1 + 2**-8 + 2**-10, 3e-39, 0.0, 1.0], jnp.float32)
    draws = jax.vmap(lambda key: stochastic(key, x))(jax.random.split(jax.random.key(0), 4000)).astype(jnp.float32)
    assert set(np.unique(draws[:, 0])) == {1.0, 1 + 2**-7}
    assert set(np.unique(draws[:, 1])) == {-1.0, -1 - 2**-7}
    np.testing.assert_allclose(draws.mean(0)[:3], x[:3], atol=4 * 2**-8 / 4000**0.5)
    assert (draws[:, 4:] == x[4:]).all(), "what bfloat16 holds stays"
    odd = jnp.asarray([np.nan, np.inf, -np.inf], jnp.float32)
    np.testing.assert_array_equal(stochastic(jax.random.key(1), odd).astype(jnp.float32), odd)


@pytest.mark.medium
@pytest.mark.parametrize("rounding", [True, False])
def test_small_updates_of_bfloat16_are_kept_by_stochastic_rounding(rounding):
    """Weight decay alone: each update is a 2000th of the parameter, far below a step of bfloat16."""
    model = SMALL.replace(numerics={"param_dtype": "bfloat16", "float32_islands": False})
    config = dataclasses.replace(
        OPTIM, learning_rate=5e-3, min_lr=5e-3, warmup_steps=0, freeze_vlm=True, stochastic_rounding=rounding
    )
    params = init_params(model, 0)
    params["action"]["w1"]["kernel"] = jnp.ones_like(params["action"]["w1"]["kernel"])
    batch = random_batch((1, 1))
    batch = dataclasses.replace(batch, action_mask=batch.action_mask * 0)  # no loss, no gradient
    optimizer = make_optimizer(config, 100)
    step, state = jax.jit(make_train_step(model, optimizer, Objective(), seed=0)), create_state(params, optimizer)
    for _ in range(40):
        state, _ = step(state, batch)
    mean = float(state.params["action"]["w1"]["kernel"].astype(jnp.float32).mean())
    assert mean == (pytest.approx((1 - 5e-4) ** 40, abs=2e-3) if rounding else 1.0)


@pytest.mark.medium
def test_bfloat16_training_follows_float32():
    """The same model, data and noise: after 30 updates the losses agree better than the run has moved."""

    def losses(param_dtype: str) -> np.ndarray:
        model = SMALL.replace(numerics={"param_dtype": param_dtype})
        optimizer = make_optimizer(OPTIM, 30)
        step = jax.jit(make_train_step(model, optimizer, Objective(), seed=0))
        params = jax.tree.map(lambda x, s: x.astype(s.dtype), start, abstract_params(model))
        state = create_state(params, optimizer)
        found = []
        for _ in range(30):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return np.array(found)

    start, batch = init_params(SMALL, 0), random_batch((1, 4))
    wide, narrow = losses("float32"), losses("bfloat16")
    assert np.abs(wide - narrow).max() < 0.1 * (wide[:5].mean() - wide[-5:].mean())


@pytest.mark.medium
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizers_lower_the_loss_on_any_mesh(name):
    optimizer = make_optimizer(dataclasses.replace(OPTIM, optimizer=name, ema_decay=0.9), 30)
    step, batch, results = make_train_step(SMALL, optimizer, Objective(), seed=0), random_batch((1, 4)), {}
    evaluate = jax.jit(make_eval_step(SMALL, Objective(), seed=3))

    def error(params) -> float:
        fixed = jax.tree.map(lambda x: x[0], batch)
        return sum(float(evaluate(params, held_out(fixed, i))[0].flow) for i in range(4))

    for mesh_config in (MeshConfig(1, 1, 1), MeshConfig(1, 2, 2)):
        devices = mesh_config.fsdp * mesh_config.tensor
        mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
        state = create_state(init_params(SMALL, 0), optimizer)
        state = jax.device_put(state, sharding.shardings(jax.eval_shape(lambda s=state: s), mesh))
        jitted, losses = jax.jit(step), []
        for _ in range(12):
            state, metrics = jitted(state, batch)
            losses.append(float(metrics["loss"]))
        results[devices] = (np.array(losses), leaves(state.ema), leaves(state.params), leaves(state.eval_params))
    np.testing.assert_allclose(results[1][0], results[4][0], rtol=2e-4)
    losses, average, last, inference = results[1]
    before, after, averaged = map(error, (init_params(SMALL, 0), tree.unflatten(last), tree.unflatten(average)))
    assert max(after, averaged) < 0.97 * before
    np.testing.assert_array_equal(inference["action/w1/kernel"], average["action/w1/kernel"])
    assert not np.array_equal(average["action/w1/kernel"], last["action/w1/kernel"])


def test_the_rate_of_each_group_is_logged():
    """Those of the window's last update; a group without parameters has none."""
    rules = (("^vision/", 1e-5), ("^decoder/", 2e-5))
    config = dataclasses.replace(OPTIM, action_expert_learning_rate=7e-4, learning_rates=rules)
    optimizer, params = make_optimizer(config, 10), abstract_params(SMALL)
    window = [
        {"finite": True, "loss": count, **learning_rates(optimizer, params, np.int32(count))} for count in (0, 1, 2)
    ]
    peaks = {"learning_rate": 1e-3, "learning_rate/rule:^vision/": 1e-5, "learning_rate/rule:^decoder/": 2e-5}
    assert averages(window) == pytest.approx(peaks | {"loss": 1}), "after two updates of warm-up"
    assert averages(window[:2]) == pytest.approx({name: peak / 2 for name, peak in peaks.items()} | {"loss": 0.5})


def test_a_run_with_one_group_logs_one_rate(state):
    optimizer = make_optimizer(
        dataclasses.replace(
            OPTIM, freeze_vlm=True, train_action_heads=False, action_expert_learning_rate=7e-4, warmup_steps=0
        ),
        10,
    )
    rates = learning_rates(optimizer, tree.split(state.params, optimizer.is_trainable)[0], np.int32(0))
    assert rates == {"learning_rate": pytest.approx(7e-4)}
