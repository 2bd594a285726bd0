"""Compile a train step for hardware that need not be present, and report the compiler's memory analysis."""

import os
import time

# Card properties that the GPU compiler needs, from vendor datasheets (NVIDIA H100 SXM, H200).
GPUS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "memory": 84_942_979_072, "bandwidth": 3_352_320_000_000},
    "h200": {"name": "NVIDIA H200 141GB HBM3e", "memory": 151_397_597_184, "bandwidth": 4_800_000_000_000},
}
TARGETS = ("cpu", *GPUS)
# The fields of XLA's GpuTargetConfigProto that both cards share: compute capability 9.0, 132 multiprocessors.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  name: "{name}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def prepare(target: str, devices: int) -> None:
    """Set up the environment to compile for `devices` devices of a target; call before JAX is initialized."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target == "cpu":
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def target_devices(target: str, count: int) -> list:
    """Return virtual CPU devices, or descriptions of GPUs, which need the CUDA plugin of `jax[cuda12]` but no GPU."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()[:count]
    config = HOPPER.format(**GPUS[target])
    try:
        return topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=config).devices
    except Exception as error:
        raise SystemExit(
            f"error: cannot compile for {target} here ({str(error).splitlines()[0]}); the GPU compiler comes with "
            'pip install "wallx-jax[cuda12]"'
        ) from error


def plan(model, optimizer, train_step, sample, batch_size: int, scan_layers: bool, target: str, devices: int) -> dict:
    """Analyse the memory of the train step on `devices` devices, parameters sharded over fsdp; allocate nothing."""

    from wallx_jax.config.schema import MeshConfig
    from wallx_jax.training import sharding
    from wallx_jax.training.init import abstract_state
    from wallx_jax.training.loop import abstract_batch
    from wallx_jax.training.step import compile_train_step

    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=devices, tensor=1), target_devices(target, devices))
    state = abstract_state(model, optimizer, mesh, scan_layers)
    batch = abstract_batch(sample, batch_size * devices, mesh, 1)
    start = time.perf_counter()
    memory = compile_train_step(train_step, state, batch).memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "target": target,
        "devices": devices,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "per_device_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs) / 2**30,
        "compile_s": time.perf_counter() - start,
    }
