"""The wrapped schedulers the tests run through, and models of which the exact flow is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

# Equal steps that divide the training timesteps: for others DDIM steps past its own timesteps.
# No clipping, which is tested by itself.
DDIM = {"clip_sample": False, "timestep_spacing": "trailing"}
SCHEDULERS: dict[str, Any] = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(shift=4.0),
    "flow-unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "flow-dpm": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "flow-dpm-x": lambda: DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True
    ),
    "unipc-epsilon": lambda: UniPCMultistepScheduler(),
    "unipc-v": lambda: UniPCMultistepScheduler(prediction_type="v_prediction"),
    "unipc-x": lambda: UniPCMultistepScheduler(prediction_type="sample"),
    "dpm-epsilon": lambda: DPMSolverMultistepScheduler(),
    "dpm-v-karras": lambda: DPMSolverMultistepScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True
    ),
    "ddim-epsilon": lambda: DDIMScheduler(**DDIM),
    "ddim-v": lambda: DDIMScheduler(prediction_type="v_prediction", **DDIM),
    "ddim-x": lambda: DDIMScheduler(prediction_type="sample", **DDIM),
    "cogvideox": lambda: CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "euler-epsilon": lambda: EulerDiscreteScheduler(),
    "euler-v": lambda: EulerDiscreteScheduler(prediction_type="v_prediction"),
    "euler-x": lambda: EulerDiscreteScheduler(prediction_type="sample"),
}


def first_order(name: str) -> Any:
    """The scheduler as diffusers runs it to first order."""
    scheduler = SCHEDULERS[name]()
    if "solver_order" in scheduler.config:
        extra = {"disable_corrector": list(range(1000))} if "unipc" in name else {}
        return type(scheduler).from_config(scheduler.config, solver_order=1, **extra)
    return scheduler


def prediction(
    kind: str, clean: torch.Tensor, sample: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    """What a model of this type puts out when it believes in ``clean``; written out from the
    definitions: velocity of flow matching is noise - clean, v is alpha noise - sigma clean."""
    noise = (sample - alpha * clean) / sigma
    if kind == "v_prediction":
        length = math.hypot(alpha, sigma)
        return (alpha * noise - sigma * clean) / length
    return {"epsilon": noise, "sample": clean, "flow_prediction": noise - clean}[kind]


def gaussian_flow(
    sample: torch.Tensor,
    start: tuple[float, float],
    stop: tuple[float, float],
    mean: float,
    std: float,
) -> torch.Tensor:
    """Exact solution of the probability-flow ODE for data N(mean, std^2), from level to level."""
    (alpha, sigma), (alpha_stop, sigma_stop) = start, stop
    spread = math.hypot(alpha * std, sigma)
    spread_stop = math.hypot(alpha_stop * std, sigma_stop)
    return alpha_stop * mean + (sample - alpha * mean) * spread_stop / spread


def posterior_mean(
    sample: torch.Tensor, alpha: float, sigma: float, mean: float, std: float
) -> torch.Tensor:
    """E[clean | sample] for data N(mean, std^2)."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (sample - alpha * mean)
