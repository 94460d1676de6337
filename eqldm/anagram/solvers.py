"""Which diffusers scheduler samples a model, by name, and which options it can serve."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor

from eqldm.anagram.options import Options
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import make_scheduler

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
FLOWS = ("dpm++", "unipc", "flow_euler")  # those that sample flow models; the last samples no other
OF_BOTH = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler")
OF_FLOWS = (*OF_BOTH, "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
OF_NOISE = (
    *OF_BOTH, "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
"""The classes that a model folder may name. Others of diffusers give Stable Diffusion's UNets other noise levels than they were trained at
(EDM's, those of videos or of inversion), need more than the UNet's output, or draw the noise of a whole batch at once. Those missing from
the flows' stop short of the picture there."""
TRAVELLING = ("DDIMScheduler", "DDPMScheduler")  # whose steps remember nothing
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # other levels than those of training
STEEPEST = 20  # fall of the noise in a first step of order 2, half of which multiplies a change of the estimate (Heun)
BLENDING = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # deterministic, at the levels of training


def is_flow(own: SchedulerMixin) -> bool:
    """Whether a folder's scheduler states a flow, in Stable Diffusion's way or in that of `FlowMatch...`."""
    return bool(own.config.get("use_flow_sigmas")) or type(own).__name__.startswith("FlowMatch")


def objective_of(own: SchedulerMixin) -> Objective:
    """What the UNet of a folder's scheduler states. As `Objective.of`, and of `FlowMatch...`, which Stable Diffusion's pipeline lacks."""
    return Objective.of(make_scheduler(_flow_config(own), SCHEDULERS["dpm++"]) if type(own).__name__.startswith("FlowMatch") else own)


def _flow_config(own: SchedulerMixin) -> dict:
    """What `FlowMatch...` states, as dpm++ and unipc put it."""
    config = own.config
    return {
        "num_train_timesteps": config.num_train_timesteps, "use_flow_sigmas": True, "prediction_type": "flow_prediction",
        "flow_shift": config.get("shift") or 1.0,
    }  # fmt: skip


def solver_for(own: SchedulerMixin, o: Options, has_latents: bool = True) -> SchedulerMixin:
    """The scheduler to sample with, for a model whose folder has `own`; its timesteps are set.

    has_latents: False for a pixel model. Raises ValueError where these options do not fit each other or the model.
    """
    flow, others = is_flow(own), ", ".join(name for name in SCHEDULERS if name != "flow_euler")
    if o.scheduler is not None and o.scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler '{o.scheduler}': wanted one of {', '.join(SCHEDULERS)}")
    if flow and o.scheduler not in (None, *FLOWS):
        raise ValueError(f"scheduler '{o.scheduler}' cannot sample a flow model: use {', '.join(FLOWS)}")
    if o.scheduler == "flow_euler" and not flow:
        raise ValueError("scheduler 'flow_euler' samples flow models, which this is not: use euler")
    fitting, use = (OF_FLOWS, ", ".join(FLOWS)) if flow else (OF_NOISE, others)
    name = type(own).__name__ if o.scheduler is None else SCHEDULERS[o.scheduler]
    if name not in fitting:
        kind = "a flow model" if flow else "a UNet of Stable Diffusion's kind"
        raise ValueError(f"the model's scheduler, {name}, cannot sample {kind}: choose another with --scheduler ({use})")
    objective_of(own)  # raises where it contradicts itself
    solver = _made(own, name, flow)
    _set_timesteps(solver, o, use)
    _check_options(solver, o, has_latents, "dpm++ or unipc" if flow else "ddim, dpm++ or unipc")
    return solver


def _made(own: SchedulerMixin, name: str, flow: bool) -> SchedulerMixin:
    """The scheduler of that class, with what `own` states."""
    matching = type(own).__name__.startswith("FlowMatch")
    if name == "FlowMatchEulerDiscreteScheduler" and not matching:
        return FlowMatchEulerDiscreteScheduler(shift=own.config.get("flow_shift") or 1.0)
    return make_scheduler(_flow_config(own) if matching and not name.startswith("FlowMatch") else dict(own.config), name)


def _set_timesteps(solver: SchedulerMixin, o: Options, use: str) -> None:
    """Raises ValueError, with what to `use`, where a scheduler cannot sample in so many steps, or is told to go another way than from
    noise to pictures."""
    name, count, most = type(solver).__name__, o.num_inference_steps, solver.config.num_train_timesteps
    if count > most:
        raise ValueError(f"num_inference_steps: got {count}, but {name} knows no more than {most} timesteps")
    for odd in ("use_dynamic_shifting", "invert_sigmas"):
        if solver.config.get(odd):
            raise ValueError(f"{name} with {odd}: true is not sampled with here: set it to false in scheduler_config.json")
    if isinstance(solver, PNDMScheduler) and not solver.config.skip_prk_steps and count < 4:
        raise ValueError(f"{name} with skip_prk_steps: false needs 4 steps or more, got {count}: use {use}")
    try:
        solver.set_timesteps(count)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} cannot sample in {count} steps: {error} Or use {use}") from error
    if not bool(solver.timesteps.isfinite().all()):  # KDPM2's ancestral one, of a model trained to pure noise
        raise ValueError(f"{name} does not find its timesteps at this model's noise levels (they are NaN): use {use}")
    begins, ends = float(solver.timesteps.max()), float(solver.timesteps.min())
    if begins > most - (not is_flow(solver)) or (begins == ends and count > 1):  # leading spacing has no room for all, and its offset
        raise ValueError(
            f"num_inference_steps: got {count}, which {name} takes from timestep {begins:g} to {ends:g} (timestep_spacing "
            f"{solver.config.get('timestep_spacing')}), of a model that knows 0 to {most - 1}: wanted fewer steps"
        )
    if solver.order > 1 and float(solver.sigmas[0]) > STEEPEST * float(solver.sigmas[1]):
        start, end = map(float, solver.sigmas[:2])
        raise ValueError(
            f"{name} corrects each step by a second estimate, magnified as the noise falls in it. At this model's noise levels the first "
            f"step of {count} falls from {start:.3g} to {end:.3g} times the signal, and would spoil the picture: use {use}"
        )
    sigmas = [key for key in SIGMAS if solver.config.get(key)]
    if sigmas and solver.config.get("use_flow_sigmas"):
        raise ValueError(f"{name} takes use_flow_sigmas or {sigmas[0]}, not both: set one to false in scheduler_config.json")
    if is_flow(solver) and (left := float(solver.sigmas[-1])) > 1e-3:
        raise ValueError(f"{name} stops where {left:.2g} of the noise is left (final_sigmas_type): set it to zero, or use {use}")
    alphas = getattr(solver, "alphas_cumprod", None)
    if solver.config.get("prediction_type") == "epsilon" and alphas is not None and float(alphas[solver.timesteps[0].long()]) < 1e-6:
        raise ValueError(f"{name}: in pure noise (rescale_betas_zero_snr) an epsilon model states no picture: use leading timestep_spacing")


def _check_options(solver: SchedulerMixin, o: Options, has_latents: bool, blending: str) -> None:
    """Raises ValueError where a scheduler, whose timesteps are set, does not serve these options."""
    name, warming = type(solver).__name__, isinstance(solver, PNDMScheduler) and not solver.config.skip_prk_steps
    if o.time_travel > 1 and name not in TRAVELLING:
        way_out = "leave it out for a flow model" if is_flow(solver) else "use ddim or ddpm"
        raise ValueError(f"time travel does a step again, which {name} would remember: {way_out}")
    if o.reduction == "alternate" and (solver.order > 1 or warming):
        raise ValueError(f"reduction=alternate shows a view a step, but {name} calls the UNet several times: use euler, ddim or dpm++")
    if o.upscale > 1 and warming:
        raise ValueError(f"upscale: {name} with skip_prk_steps: false can only begin with noise: use ddim or dpm++")
    if o.blend == "pixels":
        if not has_latents:
            raise ValueError("blend=pixels decodes latents at each step, but this is a pixel model: leave blend=latents")
        sigmas = [key for key in SIGMAS if solver.config.get(key)]
        if name not in BLENDING or sigmas or "sde" in str(solver.config.get("algorithm_type")):
            raise ValueError(f"blend=pixels cannot use {name}{' with ' + sigmas[0] if sigmas else ''}: use {blending}")


def begin(solver: SchedulerMixin, first: int) -> Tensor:
    """The timesteps that `solver.step` is given in turn from its step number `first` on, of which it is told; they must be set.

    A scheduler of order 2 has two timesteps for each of its steps. Source: diffusers' image-to-image pipelines, `get_timesteps`.
    """
    steps = solver.timesteps
    if isinstance(solver, PNDMScheduler) and first:  # its method begins by doing its second step twice, wherever it begins
        left = steps.unique_consecutive()[first:]
        return torch.cat([left[:2], left[1:]])
    if hasattr(solver, "set_begin_index") and first:
        solver.set_begin_index(first * solver.order)
    return steps[first * solver.order :]
