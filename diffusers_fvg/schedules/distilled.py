"""Sampling presets for weights of other authors that are distilled to few steps, for use together with the anchor LoRA.

Such weights work only at the noise levels of their training, and already contain the guidance, so that its scale is 1. Load a
distilled LoRA in addition to the anchor LoRA, with `pipe.load_lora_weights("lightx2v/Wan2.2-Lightning", subfolder=...)`; complete
weights replace the base's transformer. Not measured: whether the anchor LoRA still keeps its frame on these weights.

The values come from these commits: ModelTC/Wan2.2-Lightning 92efeb4, ModelTC/LightX2V f8aee98 and for image-to-video 29c8504,
hao-ai-lab/FastVideo 03e21aa, Lightricks/LTX-Video bc4ab62, Tencent-Hunyuan/HunyuanVideo-1.5 03719ce.
"""

from __future__ import annotations

from .flow import shifted_sigmas
from .presets import SchedulerPreset


# The explicit sigmas already contain the shift.
UNSHIFTED = {"num_train_timesteps": 1000, "shift": 1.0}

# LightX2V's steps 1000, 750, 500 and 250 at shift 5 are the timesteps 1000, 937.5, 833.3 and 625. The authors train on estimates
# with new noise, and sample with Euler steps.
LIGHTX2V_SHIFT = 5.0
LIGHTX2V_SIGMAS = shifted_sigmas(4, LIGHTX2V_SHIFT)

# FastWan's timesteps 1000, 757 and 522, which do not follow from a shift. After each step, new noise is mixed into the estimate.
# The authors take the noise level from a table of 1000 levels at shift 8; it is the one nearest to timestep / 1000.
FASTWAN_SIGMAS = (1.0, 0.757, 0.522)

# Name in `models.MODELS` -> presets.
DISTILLED_PRESETS: dict[str, tuple[SchedulerPreset, ...]] = {
    "Wan2.2-T2V-A14B": (
        SchedulerPreset(
            "lightning-4",
            "FlowMatchEulerDiscreteScheduler",
            UNSHIFTED,
            LIGHTX2V_SIGMAS,
            LIGHTX2V_SHIFT,
            guidance_scale=1.0,
            weights="lightx2v/Wan2.2-Lightning",
            source="ModelTC/Wan2.2-Lightning, wan/configs/wan_t2v_A14B.py: 4 steps, shift 5, guidance 1 and 1, boundary 0.875; "
            "generate.py: Euler. lightx2v/Wan2.2-Distill-Loras has the same: ModelTC/LightX2V, configs/distill/wan22/"
            "wan_moe_t2v_distill_lora.json",
        ),
    ),
    "Wan2.1-T2V-14B": (
        SchedulerPreset(
            "lightx2v-4",
            "FlowMatchEulerDiscreteScheduler",
            UNSHIFTED,
            LIGHTX2V_SIGMAS,
            LIGHTX2V_SHIFT,
            guidance_scale=1.0,
            weights="lightx2v/Wan2.1-Distill-Loras",
            source="ModelTC/LightX2V, configs/distill/wan21/wan_t2v_distill_lora_4step_cfg.json: steps, shift, guidance off; "
            "lightx2v/models/schedulers/wan/step_distill/scheduler.py: Euler",
        ),
    ),
    "Wan2.2-TI2V-5B": (
        SchedulerPreset(
            "fastwan-3",
            "FlowMatchLCMScheduler",
            UNSHIFTED,
            FASTWAN_SIGMAS,
            flow_shift=5.0,
            guidance_scale=1.0,
            weights="FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
            source="hao-ai-lab/FastVideo, fastvideo/configs/pipelines/wan.py, FastWan2_2_TI2V_5B_Config; "
            "fastvideo/pipelines/stages/denoising.py, DmdDenoisingStage: estimate and new noise, no guidance",
        ),
    ),
}


def _unguided(name: str, sigmas: tuple[float, ...], weights: str, source: str, flow_shift: float | None = None):
    """Returns a preset with Euler steps and without guidance."""
    kind = "FlowMatchEulerDiscreteScheduler"
    return SchedulerPreset(
        name, kind, UNSHIFTED, sigmas, flow_shift, guidance_scale=1.0, weights=weights, source=source
    )


_LTX2 = _unguided(
    "distilled-8",
    (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875),
    "diffusers/LTX-2.3-Distilled-Diffusers",
    "huggingface/diffusers 58eb52c, pipelines/ltx2/utils.py, DISTILLED_SIGMA_VALUES, of Lightricks/LTX-2, "
    "ltx_pipelines/utils/constants.py; no guidance: its documentation of LTX-2",
)
# Family of image-to-video pipelines in `animate.families` -> presets.
DISTILLED_ANIMATOR_PRESETS: dict[str, tuple[SchedulerPreset, ...]] = {
    "Wan2.2-I2V": (
        _unguided(
            "lightning-4",
            LIGHTX2V_SIGMAS,
            "lightx2v/Wan2.2-Distill-Loras",
            "ModelTC/LightX2V, configs/distill/wan22/wan_moe_i2v_distill_with_lora.json: steps, shift, guidance off, of which two "
            "steps are of the high-noise expert",
            LIGHTX2V_SHIFT,
        ),
    ),
    "Wan2.1-I2V": (
        _unguided(
            "lightx2v-4",
            LIGHTX2V_SIGMAS,
            "lightx2v/Wan2.1-Distill-Loras",
            "ModelTC/LightX2V, configs/distill/wan21/wan_i2v_distill_lora_4step_cfg.json: steps, shift, guidance off",
            LIGHTX2V_SHIFT,
        ),
    ),
    "LTX-Video image-to-video": (
        _unguided(
            "distilled-7",
            (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725),
            "Lightricks/LTX-Video-0.9.7-distilled",
            "Lightricks/LTX-Video, configs/ltxv-13b-0.9.7-distilled.yaml, first_pass",
        ),
    ),
    "LTX-2 image-to-video": (_LTX2,),
    "LTX-2 conditions": (_LTX2,),
    "HunyuanVideo-1.5-I2V": (
        _unguided(
            "step-distilled-8",
            shifted_sigmas(8, 7.0),
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled",
            "Tencent-Hunyuan/HunyuanVideo-1.5, README.md: 8 or 12 steps, shift 7, guidance 1",
            7.0,
        ),
    ),
}
