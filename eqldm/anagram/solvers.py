"""Which diffusers scheduler samples a model, by name, and which options it can serve."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from eqldm.anagram.options import Options
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
TRAVELLING = ("DDIMScheduler", "DDPMScheduler")  # whose steps remember nothing
BLENDING = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # deterministic, at the levels of training


def solver_for(own: SchedulerMixin, o: Options, has_latents: bool = True) -> SchedulerMixin:
    """The scheduler to sample with, for a model whose folder has `own`; its timesteps are not set.

    has_latents: False for a pixel model. Raises ValueError where these options do not fit each other or the model.
    """
    if o.scheduler is not None and o.scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler '{o.scheduler}': wanted one of {', '.join(SCHEDULERS)}")
    flow = bool(own.config.get("use_flow_sigmas"))
    if flow and o.scheduler not in (None, *FLOWS):
        raise ValueError(f"scheduler '{o.scheduler}' cannot sample a flow model: use {', '.join(FLOWS)}")
    if o.scheduler == "flow_euler":
        if not flow:
            raise ValueError("scheduler 'flow_euler' samples flow models, which this is not: use euler")
        solver = FlowMatchEulerDiscreteScheduler(shift=own.config.get("flow_shift") or 1.0)
    else:
        solver = make_scheduler(dict(own.config), type(own).__name__ if o.scheduler is None else SCHEDULERS[o.scheduler])
    name = type(solver).__name__
    if o.time_travel > 1 and name not in TRAVELLING:
        raise ValueError(f"time travel does a step again, which {name} would remember: use ddim or ddpm")
    if o.blend == "pixels":
        if not has_latents:
            raise ValueError("blend=pixels decodes latents at each step, but this is a pixel model: leave blend=latents")
        sigmas = [key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if solver.config.get(key)]
        if name not in BLENDING or sigmas or "sde" in str(solver.config.get("algorithm_type")):
            raise ValueError(f"blend=pixels cannot use {name}{' with ' + sigmas[0] if sigmas else ''}: use ddim, dpm++ or unipc")
    return solver
