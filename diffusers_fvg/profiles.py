# For one release: this is `pipelines.profiles` now.
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
