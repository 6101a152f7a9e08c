"""How a model is spread over the processes of a run: PyTorch's own engines behind one interface.

    ddp     every rank holds all; gradients are summed in buckets while the backward pass runs
            (torch.nn.parallel.DistributedDataParallel)
    fsdp2   weights, gradients and optimizer state are sharded by rows, layer by layer; a layer is
            gathered for its forward and again for its backward pass
            (torch.distributed.fsdp.fully_shard; ZeRO-3 of arXiv 1910.02054)
    zero1   the same engine, but weights stay gathered from the first micro-batch of a step to the
            last: optimizer state is sharded, and a step costs the bytes of one all-reduce (ZeRO-1)

Losses are divided by the counts of the whole step, so gradients are summed over ranks and never
averaged. Weights travel and gradients are summed in float32; the products are in ``run.precision``.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metro_ext.config_schema import Config
from metro_ext.distributed import World
from metro_ext.errors import UserError
from metro_ext.model import Packing, PretrainingModel, start_value
from metro_ext.objective import Objective, StepOutput
from metro_ext.ops import Normed


class Local:
    """One process: the model as it is. Also the interface of the other engines.

    model: its parameters are whole here.

    Args:
        early_backward: see `Objective`. Not for the engines that exchange gradients, which expect
            one backward pass after the forward pass, nor for torch.compile.
    """

    def __init__(self, model: PretrainingModel, objective: Objective, early_backward: bool = False):
        self.model, self._objective, self._early_backward = model, objective, early_backward

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer updates: this rank's part of each parameter, gradients in `grad`."""
        return self.model.named_parameters()

    def run(
        self,
        model: PretrainingModel,
        tokens: Tensor,
        packing: Packing,
        denominators: Tensor | None = None,
    ) -> StepOutput:
        """The objective on one micro-batch; `model` is there for the signature of Objective."""
        early = self._early_backward and torch.is_grad_enabled()
        return self._objective(model, tokens, packing, denominators, early)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch: gradients are exchanged in the step's last one alone."""
        return contextlib.nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradients down to `max_norm` over all ranks.

        Returns:
            float32 [], their norm before; on the device, and without waiting for it.
        """
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of which `part` belongs to this rank's part of parameter `name`.

        A collective: every rank must call it.
        """
        return part

    def part(self, name: str, whole: Tensor) -> Tensor:
        """The inverse of `whole`."""
        return whole


class _Step(nn.Module):
    """The objective as a module, since the engines hook the forward pass of one."""

    def __init__(self, model: PretrainingModel, objective: Objective):
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, tokens: Tensor, packing: Packing, denominators: Tensor | None):
        out = self._objective(self.model, tokens, packing, denominators)
        return tuple(vars(out).values())  # the engines look for tensors in tuples


class Replicated(Local):
    """DistributedDataParallel: all of the model on every rank."""

    def __init__(self, model: PretrainingModel, objective: Objective):
        super().__init__(model, objective)
        device = next(model.parameters()).device
        self._step = nn.parallel.DistributedDataParallel(
            _Step(model, objective),
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        self._step.register_comm_hook(None, _sum_bucket)

    def run(self, model, tokens, packing, denominators=None):
        # DDP prepares for a backward pass whenever gradients are on; evaluation goes past it.
        step = self._step if torch.is_grad_enabled() else self._step.module
        return StepOutput(*step(tokens, packing, denominators))

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self._step.no_sync()


def _sum_bucket(_state, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's default hook without its division by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(Local):
    """fully_shard: this rank's rows of every parameter.

    Args:
        model: on the meta device; it is given memory and its start values here, a shard at a time.
        keep_gathered: weights stay whole from the first forward pass of a step to its last
            backward pass (``zero1``).
    """

    def __init__(
        self,
        model: PretrainingModel,
        objective: Objective,
        device: torch.device,
        seed: int,
        keep_gathered: bool,
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        super().__init__(model, objective)
        self._keep_gathered = keep_gathered
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._root = _Step(model, objective)
        shard = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=not keep_gathered)
        for encoder in (model.auxiliary, model.main):
            for layer in encoder.layers if encoder is not None else ():
                shard(layer)
        # The token table and the heads are used outside their modules' forward passes: the root
        # gathers them for the whole of a step.
        shard(self._root)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._root.to_empty(device=device)
        self._parameters = dict(model.named_parameters())
        self._parts = {name: value.to_local().detach() for name, value in self._parameters.items()}
        for name, value in self._parts.items():
            start = start_value(model.config, name, self._parameters[name].shape, seed)
            value.copy_(self.part(name, start))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._parts.items())

    def run(self, model, tokens, packing, denominators=None):
        return StepOutput(*self._root(tokens, packing, denominators))

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        if self._keep_gathered:
            self._root.set_reshard_after_backward(last)
        yield

    def clip(self, max_norm: float) -> Tensor:
        sharded = self._parameters.values()
        norm = torch.nn.utils.clip_grad_norm_(sharded, max_norm).full_tensor()
        for name, value in self._parameters.items():
            gradient = value.grad
            self._parts[name].grad = None if gradient is None else gradient.to_local()
            value.grad = None
        return norm

    def whole(self, name: str, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if part.dim() == 0:  # a count of steps: the same on every rank
            return part
        like = self._parameters[name]
        return DTensor.from_local(
            part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        ).full_tensor()

    def part(self, name: str, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        if whole.dim() == 0:
            return whole
        like = self._parameters[name]
        whole = whole.to(self._parts[name].device)
        # Every rank has the whole: nothing is sent.
        return distribute_tensor(
            whole, like.device_mesh, like.placements, src_data_rank=None
        ).to_local()


def engine(config: Config, objective: Objective, device: torch.device, world: World) -> Local:
    """The model of a configuration, initialised, on the engine that it names.

    Raises:
        UserError: the settings do not go together.
    """
    mode, sharded = config.parallel.mode, config.parallel.mode in ("zero1", "fsdp2")
    if sharded and not world.distributed:
        raise UserError(
            f"parallel.mode={mode} needs a launcher, even for one process: start it with "
            "torchrun --nproc-per-node N -m metro_ext.train"
        )
    if sharded and config.run.compile:
        raise UserError(f"run.compile goes with parallel.mode=ddp, found {mode}")
    with torch.device("meta") if sharded else contextlib.nullcontext():
        model = PretrainingModel(config.model, config.objective.name, config.run.seed)
    recompute_layers(model, config.run.recompute)
    run = torch.compile(objective, dynamic=False) if config.run.compile else objective
    if sharded:
        return Sharded(model, run, device, config.run.seed, keep_gathered=mode == "zero1")
    model = model.to(device)
    if world.distributed:
        return Replicated(model, run)
    return Local(model, run, early_backward=not config.run.compile)


def recompute_layers(model: PretrainingModel, policy: str) -> None:
    """Activation checkpointing (arXiv 1604.06174): what is not kept is computed again.

    Dropout is a function of seed and position, so recomputing repeats it without any state.

    Args:
        policy: ``none``; ``norms``, the outputs of the norms alone; ``alternate`` (every second
            layer keeps its input alone) or ``all``.
    """
    for encoder in (model.auxiliary, model.main):
        layers = encoder.layers if encoder is not None else ()
        for layer in layers:
            layer.recompute_norms = policy == "norms"
        for layer in {"alternate": layers[::2], "all": layers}.get(policy, ()):
            layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Normed], x: Normed, *others) -> Normed:
    # Without the rest of x, which would be kept for nothing.
    alone = x._replace(sum=x.out)
    return checkpoint(forward, alone, *others, use_reentrant=False, preserve_rng_state=False)
