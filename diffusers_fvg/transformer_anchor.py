# For one release: this is `animate.transformer_anchor` now.
from .animate.transformer_anchor import AnchorConditionedTransformer3D  # noqa: F401
