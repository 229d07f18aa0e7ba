# Kept for one release: this module is now `animate.transformer_anchor`.
from .animate.transformer_anchor import AnchorConditionedTransformer3D  # noqa: F401
