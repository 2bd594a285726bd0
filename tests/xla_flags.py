"""XLA flags for tests, which compile much and compute little."""

# Nothing is optimised, and loops come from the older of XLA's two emitters for CPUs: it compiles twice as fast.
QUICK_COMPILE = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    )
)
