from diffusers_fvg import FactorizedDreamerPipeline  # noqa: F401
