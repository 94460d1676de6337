"""DeepSpeed's ZeRO as a strategy of ours: its config, its checkpoints, and the EMA among its sharded optimizer state.

Weights, optimizer and EMA stay in float32 and the forward pass runs under autocast, as with the other strategies: what a run
computes does not depend on how it is spread. DeepSpeed itself is imported where it is used, for it takes seconds.

Source: ZeRO, arXiv 1910.02054, section 5: stage 1 shards the optimizer's state, 2 also the gradients, 3 also the weights.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from eqldm.atomic import replace_folder, to_disk
from eqldm.config import DiffusionConfig, micro_batch_size
from eqldm.training.averaging import join
from eqldm.training.callbacks import check_finite
from eqldm.training.checkpoints import ABOUT, UNREADABLE, check_shards, damaged, read_about, unreadable_shards, written
from eqldm.training.identity import ID
from eqldm.weights import read_pickle

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
AVERAGE = "ema"  # among the optimizer's state
# In a shard, the flat weights, and the optimizer's state of each of them: of stages 1 and 2, and of 3
WEIGHTS_AND_STATES = (("single_partition_of_fp32_groups", "base_optimizer_state"), ("fp32_flat_groups", "optimizer_state_dict"))
BUCKET = 50_000_000  # gradients reduced at once, of each of two buffers; DeepSpeed's 500 million would take gigabytes
LIVE = 100_000_000  # weights that stage 3 keeps gathered; DeepSpeed's thousand million are more than Stable Diffusion's UNet has


def zero_config(config: DiffusionConfig, precision: str, overlap: bool) -> dict:
    """DeepSpeed's config, made of our options; Lightning adds `gradient_accumulation_steps`.

    precision: 32-true or bf16-mixed.  overlap: reduce gradients beside the backward pass, which needs CUDA's streams.
    """
    clip_norm, stage = config.optimizer.clip_norm, ZERO[config.run.strategy]
    live = {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size(config),
        "gradient_clipping": clip_norm if math.isfinite(clip_norm) else 0.0,
        "zero_allow_untested_optimizer": True,  # of ours it asks no more than of any: a step over flat tensors
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": overlap,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **live,
        },
        # No module may be sent in bfloat16: DeepSpeed would sum the gradients of convolutions in it, DDP does not
        "torch_autocast": {"enabled": precision == "bf16-mixed", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


class ZeRO(DeepSpeedStrategy):
    """Lightning's strategy, on CPUs too, with checkpoints that are written beside their name and then renamed.

    A checkpoint is a folder to which each process writes its shard, so the run folder must be one that all of them see; it resumes with
    as many processes as wrote it.
    """

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):  # Lightning admits CUDA alone
            import deepspeed
            from deepspeed.accelerator import set_accelerator
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one, where gloo does
            self.parallel_devices: list[torch.device] = [torch.device("cpu", rank) for rank in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    def backward(self, closure_loss, optimizer, *args, **kwargs) -> Tensor:
        # Lightning has divided the loss by the micro-batches of a step, and DeepSpeed would do so once more: gradients would be too
        # small for their clipping
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
        path = Path(filepath)
        partial = path.with_name(path.name + ".partial")  # one name for all processes; the run folder is locked
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier()
        with written(path):
            super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        with written(path):
            for file in sorted(file for file in partial.rglob("*") if file.is_file())[self.global_rank :: self.world_size]:
                to_disk(file)
        self.barrier()
        if self.is_global_zero:
            about = {"global_step": checkpoint["global_step"], "processes": self.world_size, ID: checkpoint.get(ID)}
            with written(path):
                (partial / ABOUT).write_text(json.dumps(about) + "\n")
                replace_folder(path, partial)
        self.barrier()

    def load_checkpoint(self, checkpoint_path, weights_only=None) -> dict:
        about = read_about(Path(checkpoint_path))
        if about["processes"] != self.world_size:
            raise ValueError(
                f"checkpoint '{checkpoint_path}' is of {about['processes']} processes, now there are {self.world_size}: ZeRO's shards "
                f"resume with as many as wrote them (run.devices x run.num_nodes)"
            )
        self._check_share(Path(checkpoint_path))
        try:
            check_checkpoint(Path(checkpoint_path))
            return super().load_checkpoint(checkpoint_path, weights_only)
        except (*UNREADABLE, OSError) as error:
            if not damaged(error):
                raise
            raise unreadable_shards(Path(checkpoint_path), error) from error

    def _check_share(self, folder: Path) -> None:
        """Each process reads its share of the files; all raise where one of them has found a damaged one."""
        faults: list[str | None] = [None] * self.world_size
        fault = None
        try:
            check_shards(folder, sorted(folder.rglob("*.pt"))[self.global_rank :: self.world_size])
        except (ValueError, OSError) as error:
            fault = str(error)
        torch.distributed.all_gather_object(faults, fault)
        if found := next(filter(None, faults), None):
            raise ValueError(found)


def check_checkpoint(folder: Path) -> None:
    """Raises ValueError, naming the file, where a checkpoint holds more than DeepSpeed writes: DeepSpeed opens it with Python's own pickle,
    which would run it."""
    for path in sorted(folder.rglob("*.pt")):
        _read_shard(path)


def _read_shard(path: Path) -> dict:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return read_pickle(path, mmap=True)


class AdamWEMA(torch.optim.AdamW):
    """AdamW that averages the weights it steps: the state `ema` of each, sharded and saved with the rest of the state.

    It starts as the first step's weights and joins the others' as `averaging.EMA` does.
    """

    def __init__(self, params, decay: float, **options):
        self.decay = decay
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for weight in (weight for group in self.param_groups for weight in group["params"] if weight.grad is not None):
            state = self.state[weight]
            if AVERAGE in state:
                join(self.decay, [state[AVERAGE]], [weight], int(state["step"]) - 1)
            else:
                state[AVERAGE] = weight.detach().clone()
        return loss


class ZeROWeights(Callback):
    """Puts whole weights into the module: the average's (with ema) for each validation; and, on process 0, for the export.

    Also the NaN guard of the gradients, which DeepSpeed clips: it ends the run after a step, before the next checkpoint.
    """

    def __init__(self, ema: bool):
        self.ema, self.swapped = ema, False
        self.kept: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
        if norm is not None:
            norm = torch.as_tensor(float(norm))
            check_finite({"grad_norm": norm}, trainer.global_step - 1, batch["key"])
            pl_module.log("train/grad_norm", norm)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        if self.ema:
            self.kept, self.swapped = whole_weights(pl_module), True
            _put(pl_module, averaged_weights(trainer, pl_module))

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if self.swapped:
            _put(pl_module, self.kept)
            self.kept, self.swapped = {}, False

    def on_fit_end(self, trainer, pl_module) -> None:
        weights = averaged_weights(trainer, pl_module) if self.ema else whole_weights(pl_module)
        weights |= frozen_weights(pl_module)
        if trainer.is_global_zero:
            for name, parameter in pl_module.named_parameters():
                parameter.data = weights.get(name, parameter.data)


def averaged_weights(trainer: pl.Trainer, module: nn.Module) -> dict[str, Tensor]:
    """The average of the trained weights by name, as `whole_weights`.

    Stages 1 and 2 look for the optimizer's state of each weight once, after the first group of weights has taken its first step, when
    the other groups have none; and not at all where a resumed run takes no step: here they look again.
    """
    optimizer = trainer.strategy.deepspeed_engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    return whole_weights(module, AVERAGE)


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights by name that do not train and that stage 3 has sharded, whole, on process 0's CPU; {} on the others.

    To be called by all processes.
    """
    import deepspeed

    weights, main = {}, torch.distributed.get_rank() == 0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                if main:
                    weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def whole_weights(module: nn.Module, state: str | None = None) -> dict[str, Tensor]:
    """The trained weights by name, or that part of their optimizer state, whole, in float32, on process 0's CPU; {} on the others.

    To be called by all processes.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights, main = {}, torch.distributed.get_rank() == 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_optimizer_state(parameter, state) if state else safe_get_full_fp32_param(parameter)
            if main:
                weights[name] = whole.detach().to("cpu", torch.float32, copy=True)
    return weights


def shard_weights(checkpoint: Path, average: bool) -> dict[str, Tensor]:
    """The whole weights of a checkpoint folder by name, or their average, in float32 on the CPU, in this process alone.

    Put together by DeepSpeed's own `zero_to_fp32`, which knows weights only: the average has their layout, so it is given a copy of the
    shards with one in the place of the other.
    Raises ValueError, with what to do, where a shard cannot be used.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    read_about(checkpoint)
    check_shards(checkpoint, sorted(checkpoint.rglob("*.pt")))
    try:
        check_checkpoint(checkpoint)
        with TemporaryDirectory() as copied, redirect_stdout(sys.stderr):
            shards = _averages_for_weights(checkpoint / "checkpoint", Path(copied)) if average else checkpoint / "checkpoint"
            return get_fp32_state_dict_from_zero_checkpoint(shards.parent, tag=shards.name)
    except (*UNREADABLE, OSError) as error:
        if not damaged(error):
            raise
        raise unreadable_shards(checkpoint, error) from error


def _averages_for_weights(shards: Path, folder: Path) -> Path:
    """The shards' copy under `folder`, with the average in the place of the weights."""
    copy = folder / shards.name
    copy.mkdir()
    for file in shards.iterdir():
        if not file.name.endswith("_optim_states.pt"):
            (copy / file.name).symlink_to(file.resolve())
            continue
        saved = _read_shard(file)
        optimizer = saved["optimizer_state_dict"]
        weights, states = WEIGHTS_AND_STATES[optimizer["zero_stage"] == 3]
        of = optimizer.pop(states)["state"]
        # What has taken no step yet, as in boundary steps, has no average but itself
        optimizer[weights] = [of.get(number, {}).get(AVERAGE, weight) for number, weight in enumerate(optimizer[weights])]
        torch.save(saved, copy / file.name)
    return copy


def _put(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Process 0's weights into the module, on all processes."""
    import deepspeed

    main = torch.distributed.get_rank() == 0
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        sharded = hasattr(parameter, "ds_id")  # stage 3: whole within the context, whose exit sends on what process 0 wrote
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if main:
                parameter.data.copy_(weights[name])
        if not sharded:
            torch.distributed.broadcast(parameter.data, 0)
