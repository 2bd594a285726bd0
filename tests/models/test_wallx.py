"""Wall-X's own parts: prefix cache, flow, flags, losses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallx_jax.models import flow, losses, scan
from wallx_jax.models.attention import sequence_mask
from wallx_jax.models.config import PRESETS, TINY, LoraConfig, Numerics, WallXConfig
from wallx_jax.models.params import abstract_params, from_params, init_params
from wallx_jax.models.wallx import FlowTarget
from wallx_jax.utils import tree

HORIZON, LENGTH = 5, 24


@pytest.fixture(scope="module")
def params():
    """Random parameters, larger than at initialisation so that differences show."""
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, init_params(TINY, seed=0))


def inputs(seed: int = 0):
    """Tokens with one 4x4-patch image and one state token, the second row left padded, and flow targets."""
    rng = np.random.default_rng(seed)
    ids = TINY.tokens
    tokens = rng.integers(0, 600, (2, LENGTH))
    tokens[:, 8:12], tokens[:, 18] = ids.image, ids.propri
    mask = np.ones((2, LENGTH), bool)
    mask[1, :5] = False
    image = rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    state = rng.uniform(-1, 1, (2, 20)).astype(np.float32)
    channels = (np.arange(20) < 14).astype(np.float32)
    actions = rng.uniform(-1, 1, (2, HORIZON, 20)).astype(np.float32) * channels
    noise = rng.normal(size=(2, HORIZON, 20)).astype(np.float32)
    mask_a = np.broadcast_to(channels, actions.shape)
    target = FlowTarget(actions, mask_a, noise, np.array([0.2, 0.7], np.float32))
    return tokens, mask, image, state, np.broadcast_to(channels, state.shape), target


def prefix_of(net, data):
    tokens, mask, image, state, state_mask, _ = data
    features, grids = net.encode_images([image])
    return net.embed_prefix(jnp.asarray(tokens), jnp.asarray(mask), features, grids, state, state_mask)


@pytest.mark.medium
@pytest.mark.parametrize("action_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("mrope_layout", ["qwen", "upstream_cuda"])
def test_prefix_cache_equals_full_recomputation(params, action_attention, mrope_layout):
    config = TINY.replace(numerics={"action_attention": action_attention, "mrope_layout": mrope_layout})
    net, data = from_params(config, params), inputs()
    target = data[-1]
    noisy = flow.interpolate(target.actions, target.noise, target.time)
    prefix = prefix_of(net, data)
    full = net.action.velocity(net.forward(prefix, (noisy, target.mask, target.time)).hidden[:, LENGTH:])
    cache, hidden = net.encode_prefix(prefix, cache_length=LENGTH + HORIZON)
    time_emb = net.action.embed_time(target.time)
    velocity, kv = net.suffix_velocity(cache, noisy, target.mask, time_emb)
    np.testing.assert_allclose(velocity, full, atol=5e-5)
    # What one call has written into the cache does not reach the next.
    again, _ = net.suffix_velocity(cache._replace(kv=kv), noisy, target.mask, time_emb)
    np.testing.assert_array_equal(again, velocity)
    np.testing.assert_allclose(hidden[0], net.forward(prefix).hidden[0], atol=5e-5)


@pytest.mark.medium
@pytest.mark.parametrize("action_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("masked_dims", ["drift", "held"])
@pytest.mark.parametrize("layers", ["stacked", "unrolled"])
def test_sampling_equals_full_recomputation_at_every_step(params, action_attention, masked_dims, layers):
    config = TINY.replace(numerics={"action_attention": action_attention, "masked_dims": masked_dims})
    data, steps = inputs(), 4
    noise, mask = jnp.asarray(data[-1].noise), data[-1].mask
    net = from_params(config, params)
    prefix = prefix_of(net, data)

    def recomputed(x, t):
        time = jnp.full(len(x), t)
        return net.action.velocity(net.forward(prefix, (x, mask, time)).hidden[:, LENGTH:])

    expected = euler(recomputed, noise, steps, mask, masked_dims)
    net = from_params(config, params if layers == "stacked" else scan.unstack_layers(params))
    np.testing.assert_allclose(net.sample_actions(prefix_of(net, data), noise, mask, steps), expected, atol=5e-5)


@pytest.mark.medium
def test_unrolled_layers_are_those_of_the_stack(params):
    data, unrolled = inputs(), scan.unstack_layers(params)
    assert scan.is_unrolled(unrolled) and not scan.is_unrolled(params)
    assert tree.flatten(unrolled)["decoder/layers/2/attn/q/kernel"].shape == (64, 64)
    one, other = (from_params(TINY, p) for p in (params, unrolled))
    target = data[-1]
    suffix = (jnp.asarray(target.noise), target.mask, target.time)
    a, b = (net.forward(prefix_of(net, data), suffix, output_hidden_states=True) for net in (one, other))
    np.testing.assert_allclose(a.hidden, b.hidden, atol=2e-4)
    np.testing.assert_allclose(a.hidden_states, b.hidden_states, atol=3e-5 * np.abs(a.hidden_states).max())
    tail = other.forward(prefix_of(other, data), suffix, tokens_to_keep=HORIZON + 3)
    np.testing.assert_allclose(tail.hidden, b.hidden[:, -(HORIZON + 3) :], atol=1e-5)
    tail = one.forward(prefix_of(one, data), suffix, tokens_to_keep=HORIZON + 3)
    np.testing.assert_allclose(tail.hidden, a.hidden[:, -(HORIZON + 3) :], atol=1e-5)
    again = scan.unstack_layers(unrolled)
    assert tree.flatten(again).keys() == tree.flatten(unrolled).keys()


def test_unrolling_layers_can_free_the_stack():
    params = init_params(TINY, seed=0)
    unrolled = scan.unstack_layers(params, free=True)
    assert params["decoder"]["layers"]["attn"]["q"]["kernel"].is_deleted()
    assert np.isfinite(tree.flatten(unrolled)["decoder/layers/3/attn/q/kernel"]).all()
    assert not params["embed"]["embedding"].is_deleted()


def test_prefix_never_sees_actions_and_padding_is_inert(params):
    net, data = from_params(TINY, params), inputs()
    tokens, mask, *rest, target = data
    noisy = flow.interpolate(target.actions, target.noise, target.time)

    def run(tokens, noisy):
        out = net.forward(prefix_of(net, (tokens, mask, *rest, target)), (noisy, target.mask, target.time))
        return np.asarray(out.hidden)

    base = run(tokens, noisy)
    moved = run(tokens, noisy + 1)
    np.testing.assert_array_equal(base[:, :LENGTH][mask], moved[:, :LENGTH][mask])
    assert np.abs(base[:, LENGTH:] - moved[:, LENGTH:]).max() > 1e-3
    other_padding = tokens.copy()
    other_padding[1, :5] = 7
    np.testing.assert_allclose(run(other_padding, noisy)[:, 5:], base[:, 5:], atol=1e-6)


def test_row_does_not_depend_on_its_padding(params):
    """The same row with more left padding gives the same velocity."""
    net, (tokens, mask, image, state, state_mask, target) = from_params(TINY, params), inputs()
    wide = np.pad(tokens, ((0, 0), (6, 0)), constant_values=TINY.tokens.pad)
    wide_mask = np.pad(mask, ((0, 0), (6, 0)))
    noise = jnp.asarray(target.noise)
    short, long = (
        net.sample_actions(prefix_of(net, (t, m, image, state, state_mask, target)), noise, target.mask, steps=3)
        for t, m in ((tokens, mask), (wide, wide_mask))
    )
    np.testing.assert_allclose(short, long, atol=2e-5)


@pytest.mark.medium
def test_flags_change_what_they_name(params):
    data = inputs()
    labels = jnp.zeros((2, 0), jnp.int32)

    def flow_sum(**numerics):
        net = from_params(TINY.replace(numerics=numerics), params)
        return float(net.loss_sums(prefix_of(net, data), labels, data[-1]).flow)

    base = flow_sum()
    assert abs(flow_sum(action_attention="causal") - base) > 1e-4 * base
    assert abs(flow_sum(mrope_layout="upstream_cuda") - base) > 1e-6 * base
    assert flow_sum(remat="none") == pytest.approx(base, rel=1e-5)
    with pytest.raises(ValueError, match="action_attention is 'both'.*bidirectional"):
        TINY.replace(numerics={"action_attention": "both"})


@pytest.mark.parametrize("layers", ["stacked", "unrolled"])
def test_kernels_compute_the_same_losses_and_gradients(params, layers):
    """Also beside padding, whose rows attend to nothing."""
    data = inputs()
    params = params if layers == "stacked" else scan.unstack_layers(params)

    def loss(params, kernels):
        net = from_params(TINY.replace(numerics={"kernels": kernels}), params)
        sums = net.loss_sums(prefix_of(net, data), jnp.asarray(data[0][:, -6:]), data[-1])
        return sums.cross_entropy + sums.flow

    (cpu, cpu_grads), (xla, xla_grads) = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, kernels) for kernels in ("cpu", "xla")
    )
    assert float(cpu) == pytest.approx(float(xla), rel=1e-5)
    for (path, a), b in zip(tree.flatten(cpu_grads).items(), jax.tree.leaves(xla_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1e-3), err_msg=path)


def test_flow_loss_reductions():
    mask = jnp.asarray(np.broadcast_to(np.arange(20) < 7, (2, 3, 20)), jnp.float32)
    assert float(flow.flow_count(mask, "all")) == 120
    assert float(flow.flow_count(mask, "valid")) == 42
    error = flow.flow_error_sum(jnp.full((2, 3, 20), 2.0), jnp.zeros((2, 3, 20)), mask)
    assert float(error) == 4 * 42


def test_actions_past_the_end_can_be_left_out_of_the_loss():
    """Neither their errors nor their channels count, whichever way the loss is reduced."""
    rng = np.random.default_rng(0)
    velocity, target = jnp.asarray(rng.normal(size=(2, 2, 3, 20)), jnp.float32)
    mask = jnp.asarray(np.broadcast_to(np.arange(20) < 7, (2, 3, 20)), jnp.float32)
    is_pad = jnp.asarray([[False, True, True], [False, False, False]])
    assert float(flow.flow_count(mask, "all", is_pad)) == 4 * 20
    assert float(flow.flow_count(mask, "valid", is_pad)) == 4 * 7
    error = flow.flow_error_sum(velocity, target, mask, is_pad)
    elsewhere = velocity.at[0, 1:].set(1e3)
    assert float(flow.flow_error_sum(elsewhere, target, mask, is_pad)) == float(error)
    kept = np.square(np.asarray(velocity - target))[~np.asarray(is_pad)][:, :7]
    assert float(error) == pytest.approx(kept.sum(), rel=1e-5)


def test_hits_count_every_token_of_the_range():
    """The first token of the range counts, the one after the last does not; nor do labels without a target."""
    labels = jnp.asarray([[5, 6, 7, 8, -100, 4]])
    said = jnp.asarray([[5, 7, 7, 8, 0, 4]])
    logits = jnp.eye(10)[said]
    assert losses.token_range_mask(labels, (5, 8)).tolist() == [[True, True, True, False, False, False]]
    assert float(losses.correct_count(logits, labels, (5, 8))) == 2


def test_sums_of_samples_add_up():
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(3, 5, 9)), jnp.float32), jnp.asarray(rng.integers(0, 9, (3, 5)))
    labels = labels.at[1].set(losses.IGNORE)
    velocity, target = jnp.asarray(rng.normal(size=(2, 3, 4, 6)), jnp.float32)
    mask = jnp.asarray(rng.random((3, 4, 6)) < 0.5, jnp.float32)
    is_pad = jnp.asarray(rng.random((3, 4)) < 0.5)
    for function, *arguments in (
        (losses.cross_entropy_sum, logits, labels),
        (losses.label_count, labels),
        (losses.token_range_count, labels, (2, 8)),
        (losses.correct_count, logits, labels, (2, 8)),
        (flow.flow_error_sum, velocity, target, mask, is_pad),
        (flow.flow_count, mask, "all", is_pad),
        (flow.flow_count, mask, "valid", is_pad),
    ):
        whole, apart = (function(*arguments, per_sample=per_sample) for per_sample in (False, True))
        assert apart.shape == (3,) and float(apart.sum()) == pytest.approx(float(whole), rel=1e-5), function
        if any(argument is labels for argument in arguments):
            assert apart[1] == 0, f"{function.__name__}: the second sample has no labels"


def euler(velocity, noise, steps, mask, how):
    """`velocity(x, t)` without a state."""
    times = flow.euler_times(steps)
    return flow.integrate(lambda x, t, _: (velocity(x, t), None), noise, times, times[:-1], None, mask, how)


def test_masked_dims_drift_or_are_held():
    noise = jnp.ones((1, 2, 3))
    mask = jnp.asarray([[[1.0, 1.0, 0.0]] * 2])
    drifted, held = (euler(lambda x, t: 2 * jnp.ones_like(x), noise, 4, mask, how) for how in ("drift", "held"))
    np.testing.assert_allclose(drifted, 3.0, atol=1e-6)
    np.testing.assert_allclose(held[..., :2], 3.0, atol=1e-6)
    np.testing.assert_allclose(held[..., 2], 0.0, atol=1e-6)


def test_euler_grid_covers_zero_to_one():
    """dx/dt = t integrated with left endpoints: sum of i/N * 1/N."""
    steps = 5
    out = euler(lambda x, t: jnp.ones_like(x) * t, jnp.zeros((1, 1, 1)), steps, jnp.ones((1, 1, 1)), "drift")
    assert float(out[0, 0, 0]) == pytest.approx(sum(i / steps for i in range(steps)) / steps)


def test_time_is_drawn_as_upstream_draws_it():
    """t = (1 - u) s with u ~ Beta(1.5, 1): E[t] = 0.4 s, never above s."""
    noise, time = flow.sample_noise_and_time(jax.random.key(0), (20000, 1, 1), TINY.action)
    assert float(time.min()) >= 0 and float(time.max()) < 0.999
    assert float(time.mean()) == pytest.approx(0.4 * 0.999, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_sequence_mask():
    mask = np.asarray(sequence_mask(jnp.asarray([[False, True, True]]), 2, "bidirectional"))[0]
    expected = [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))
    causal = np.asarray(sequence_mask(jnp.asarray([[False, True, True]]), 2, "causal"))[0]
    assert not causal[3, 4] and causal[4, 3]


def test_one_compilation_serves_every_prompt(params):
    """Image and padding places are read off the ids, so they do not recompile."""
    traces = 0

    @jax.jit
    def run(params, tokens, mask, image):
        nonlocal traces
        traces += 1
        net = from_params(TINY, params)
        features, grids = net.encode_images([image])
        return net.forward(net.embed_prefix(tokens, mask, features, grids)).hidden

    for seed in range(3):
        tokens, mask, image, *_ = inputs(seed)
        run(params, jnp.asarray(np.roll(tokens, seed, axis=1)), jnp.asarray(np.roll(mask, seed)), image)
    assert traces == 1


NUMERICS = st.builds(
    Numerics,
    **{
        field.name: st.booleans() if field.type is bool else st.sampled_from(field.type)
        for field in dataclasses.fields(Numerics)
    },
)


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from([*PRESETS.values(), TINY.replace(action={"intermediate_size": None})]),
    NUMERICS,
    st.sampled_from([LoraConfig(), LoraConfig(rank=4, alpha=2.0, targets=("decoder/layers/attn/q",))]),
)
def test_config_json_round_trip(preset, numerics, lora):
    config = dataclasses.replace(preset, numerics=numerics, lora=lora)
    ids = {name: getattr(config.tokens, name) for name in ("pad", "propri", "action")}  # only a tokenizer knows these
    assert WallXConfig.from_hf(json.loads(json.dumps(config.to_hf()))).replace(tokens=ids) == config


def test_abstract_parameters_match_initialised_ones():
    abstract, concrete = (tree.flatten(t) for t in (abstract_params(TINY), init_params(TINY, 1)))
    assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {k: (v.shape, v.dtype) for k, v in concrete.items()}
    wide = tree.flatten(abstract_params(PRESETS["wall_oss_3b"]))
    assert sum(int(np.prod(x.shape)) for x in wide.values()) == 4220395520
