# Kept for one release: this module is now `pipelines.profiles`.
from .pipelines.profiles import (  # noqa: F401
    CARDS,
    GIB,
    WAN_VAES,
    MemoryPlan,
    Stage,
    apply_memory_profile,
    model_stages,
    pipeline_stages,
    plan_memory,
)
