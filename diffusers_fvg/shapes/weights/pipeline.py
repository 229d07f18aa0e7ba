from diffusers_fvg import FactorizedVideoPipeline  # noqa: F401
