"""Published benchmarks: their prompts, the official file names of videos, and the official totals of evaluators' results."""

from .evalcrafter import EVALCRAFTER
from .suite import Suite
from .t2v_compbench import T2V_COMPBENCH_V1, T2V_COMPBENCH_V2
from .vbench2 import VBENCH_2
from .vbench_i2v import VBENCH_I2V


PUBLISHED: tuple[Suite, ...] = (T2V_COMPBENCH_V1, T2V_COMPBENCH_V2, VBENCH_2, EVALCRAFTER, VBENCH_I2V)
