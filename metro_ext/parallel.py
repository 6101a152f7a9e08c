"""How a model is spread over the processes of a run: PyTorch's own engines behind one interface.

    ddp     every rank holds all; gradients are summed in buckets while the backward pass runs
            (torch.nn.parallel.DistributedDataParallel)
    fsdp2   weights, gradients and optimizer state are sharded by rows, layer by layer; a layer is
            gathered for its forward and again for its backward pass
            (torch.distributed.fsdp.fully_shard; ZeRO-3 of arXiv 1910.02054)
    zero1   the same engine, but weights stay gathered from the first micro-batch of a step to the
            last: optimizer state is sharded, and a step costs the bytes of one all-reduce (ZeRO-1)

Losses are divided by the counts of the whole step, so gradients are summed over ranks and never
averaged. Products are in ``run.precision``, and so are matrices that are gathered for them; the
rest, and gradients, travel in float32.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metro_ext.config_schema import Config
from metro_ext.distributed import World
from metro_ext.errors import UserError
from metro_ext.hardware import DTYPES
from metro_ext.model import Layer, Packing, PretrainingModel, start_value
from metro_ext.objective import Objective, RunsObjective, StepOutput
from metro_ext.ops import Normed
from metro_ext.optim import decays
from metro_ext.products import lower_products

if TYPE_CHECKING:  # imported only by the engines that need it: it takes a second
    from torch.distributed.tensor import DTensor


class Local:
    """One process: the model as it is. Also the interface of the other engines.

    model: its parameters are whole here.

    Args:
        early_backward: see `Objective`. Not for the engines that exchange gradients, which expect
            one backward pass after the forward pass, nor for torch.compile.
    """

    def __init__(
        self, model: PretrainingModel, objective: RunsObjective, early_backward: bool = False
    ):
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
            float32 [3], norms before: of all gradients, of those of the auxiliary model's own
            parameters, of the others; on the device, and without waiting for it.
        """
        return clip_gradients(dict(self.model.named_parameters()), max_norm)

    def spread(self, name: str, part: Tensor) -> Tensor:
        """`part`, on the CPU, as what it is of the whole tensor: a DTensor where ranks share it.

        It shares the memory of `part`.

        Args:
            name: of the parameter that this is, or that this state of the optimizer belongs to.
        """
        return part


class _Step(nn.Module):
    """The objective as a module, since the engines hook the forward pass of one."""

    def __init__(self, model: PretrainingModel, objective: RunsObjective):
        super().__init__()
        self.model, self._objective = model, objective

    def forward(
        self, tokens: Tensor | None, packing: Packing | None, denominators: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Without a batch: the sum of all parameters, so that its backward pass is of them all."""
        if tokens is None or packing is None:
            sums = [parameter.sum() for parameter in self.model.parameters()]
            return (torch.stack(sums).sum(),)
        out = self._objective(self.model, tokens, packing, denominators)
        return tuple(vars(out).values())  # the engines look for tensors in tuples


class Replicated(Local):
    """DistributedDataParallel: all of the model on every rank."""

    def __init__(self, model: PretrainingModel, objective: RunsObjective, world: World):
        super().__init__(model, objective)
        device = next(model.parameters()).device
        self._step = nn.parallel.DistributedDataParallel(
            _Step(model, objective),
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        self._step.register_comm_hook(world, _sum_bucket)
        self._settle_buckets(world)

    def _settle_buckets(self, world: World) -> None:
        """Takes a backward pass for nothing, after the first of which DDP makes its buckets anew.

        On three ranks and more the place in a bucket decides in which order a ring adds up: the
        first step of a resumed run would differ in the last bits from the unbroken run's.
        """
        sent = world.traffic.sent
        (everything,) = self._step(None, None, None)
        everything.backward()
        for parameter in self._step.parameters():
            parameter.grad = None
        world.traffic.sent = sent

    def run(
        self,
        model: PretrainingModel,
        tokens: Tensor,
        packing: Packing,
        denominators: Tensor | None = None,
    ) -> StepOutput:
        # DDP prepares for a backward pass whenever gradients are on; evaluation goes past it.
        step = self._step if torch.is_grad_enabled() else self._step.module
        return StepOutput(*step(tokens, packing, denominators))

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self._step.no_sync()


def _sum_bucket(world: World, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's default hook without its division by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    world.traffic.all_reduce(bucket.buffer().nbytes, world.size)
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(Local):
    """fully_shard: this rank's rows of every parameter.

    Args:
        model: on the meta device; it is given memory and its start values here, a shard at a time.
        dtype: of products; matrices travel rounded to it (`metro_ext.shard_exchange`).
        keep_gathered: weights stay whole from the first forward pass of a step to its last
            backward pass (``zero1``).
    """

    def __init__(
        self,
        model: PretrainingModel,
        objective: RunsObjective,
        device: torch.device,
        seed: int,
        dtype: torch.dtype,
        keep_gathered: bool,
        world: World,
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        from metro_ext.shard_exchange import Gather, Scatter, own_parameters

        super().__init__(model, objective)
        self._keep_gathered = keep_gathered
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Checkpoints are written from host memory.
        self._cpu_mesh = mesh if device.type == "cpu" else init_device_mesh("cpu", mesh.shape)
        self._root = _Step(model, objective)
        for encoder in (model.auxiliary, model.main):
            for layer in encoder.layers if encoder is not None else ():
                fully_shard(layer, mesh=mesh, reshard_after_forward=not keep_gathered)
        # The token table and the heads are used outside their modules' forward passes: the root
        # gathers them for the whole of a micro-batch.
        self._sharded = fully_shard(self._root, mesh=mesh, reshard_after_forward=False)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                own = [(p, decays(names[id(p)], p)) for p in own_parameters(module)]
                # Rows are shared out in equal parts, the last ones filled up.
                sizes = [
                    (-(-p.shape[0] // world.size) * math.prod(p.shape[1:]), matrix)
                    for p, matrix in own
                ]
                gather, scatter = Gather(sizes, dtype, world), Scatter(world)
                # They have the methods that torch calls; its base classes are private.
                module.set_custom_all_gather(gather)  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
        self._root.to_empty(device=device)
        self._parameters = cast(dict[str, "DTensor"], dict(model.named_parameters()))
        self._parts = {name: value.to_local().detach() for name, value in self._parameters.items()}
        for name, value in self._parts.items():
            start = start_value(model.config, name, self._parameters[name].shape, seed)
            value.copy_(self._part(name, start))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._parts.items())

    def run(
        self,
        model: PretrainingModel,
        tokens: Tensor,
        packing: Packing,
        denominators: Tensor | None = None,
    ) -> StepOutput:
        return StepOutput(*self._root(tokens, packing, denominators))

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._sharded.set_requires_gradient_sync(last)
        if self._keep_gathered:
            self._sharded.set_reshard_after_backward(last)
        yield

    def clip(self, max_norm: float) -> Tensor:
        norms = clip_gradients(self._parameters, max_norm)
        for name, value in self._parameters.items():
            gradient = cast("DTensor | None", value.grad)
            self._parts[name].grad = None if gradient is None else gradient.to_local()
            value.grad = None
        return norms

    def spread(self, name: str, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        # A count of steps is the same on every rank; of one rank, any part is the whole.
        if part.dim() == 0 or self._cpu_mesh.size() == 1:
            return part
        like = self._parameters[name]
        return DTensor.from_local(
            part, self._cpu_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that it has whole: nothing is sent."""
        from torch.distributed.tensor import distribute_tensor

        like = self._parameters[name]
        whole = whole.to(self._parts[name].device)
        return distribute_tensor(
            whole, like.device_mesh, like.placements, src_data_rank=None
        ).to_local()


def check_mode(config: Config, world: World) -> None:
    """UserError where the settings of `parallel.mode` do not go together."""
    mode = config.parallel.mode
    if mode == "ddp":
        return
    if not world.distributed:
        raise UserError(
            f"parallel.mode={mode} needs a launcher, even for one process: start it with "
            "torchrun --nproc-per-node N -m metro_ext.train"
        )
    if config.run.compile:
        raise UserError(f"run.compile goes with parallel.mode=ddp, found {mode}")


def clip_gradients(parameters: Mapping[str, Tensor], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, with the norms of both models from the same pass.

    Args:
        parameters: by name, whole or DTensors; those without a gradient take no part.
        max_norm: of all gradients together.

    Returns:
        float32 [3], as in `Local.clip`.
    """
    with_gradient = {name: p for name, p in parameters.items() if p.grad is not None}
    gradients = [p.grad for p in with_gradient.values() if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    each = dict(zip(with_gradient, norms, strict=True))
    own = [norm for name, norm in each.items() if name.startswith("auxiliary")]
    others = [norm for name, norm in each.items() if not name.startswith("auxiliary")]
    total, main = _norm(norms), _norm(others)
    auxiliary = _norm(own) if own else torch.zeros_like(total)
    torch.nn.utils.clip_grads_with_norm_(with_gradient.values(), max_norm, total)
    return torch.stack([total, auxiliary, main])


def _norm(norms: Sequence[Tensor]) -> Tensor:
    """float32 [], whole on every rank: the norm of a vector of which `norms` are those of parts."""
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def engine(config: Config, objective: Objective, device: torch.device, world: World) -> Local:
    """The model of a configuration, initialised, on the engine that it names.

    Raises:
        UserError: the settings do not go together.
    """
    mode, sharded = config.parallel.mode, config.parallel.mode in ("zero1", "fsdp2")
    check_mode(config, world)
    with torch.device("meta") if sharded else contextlib.nullcontext():
        model = PretrainingModel(config.model, config.objective.name, config.run.seed)
    lower_products(model, config, device)
    recompute_layers(model, config.run.recompute)
    run: RunsObjective = (
        torch.compile(objective, dynamic=False) if config.run.compile else objective
    )
    if sharded:
        dtype, keep_gathered = DTYPES[config.run.precision], mode == "zero1"
        return Sharded(model, run, device, config.run.seed, dtype, keep_gathered, world)
    model = model.to(device)
    if world.distributed:
        return Replicated(model, run, world)
    return Local(model, run, early_backward=not config.run.compile)


def recompute_layers(model: PretrainingModel, policy: str) -> None:
    """Activation checkpointing (arXiv 1604.06174): what is not kept is computed again.

    Dropout is a function of seed and position, so recomputing repeats it without any state.

    Args:
        policy: ``none``; ``norms``, the outputs of the norms alone; ``alternate`` (every second
            layer keeps its input alone) or ``all``.
    """
    for encoder in (model.auxiliary, model.main):
        layers = cast(list[Layer], list(encoder.layers)) if encoder is not None else []
        for layer in layers:
            layer.recompute_norms = policy == "norms"
        for layer in {"alternate": layers[::2], "all": layers}.get(policy, ()):
            forward = functools.partial(_recomputed, layer.forward)
            layer.forward = forward  # type: ignore[method-assign]  # of this one object, on purpose


def _recomputed(forward: Callable[..., Normed], x: Normed, *others: Any) -> Normed:
    # Without the rest of x, which would be kept for nothing.
    alone = x._replace(sum=x.out)
    return checkpoint(forward, alone, *others, use_reentrant=False, preserve_rng_state=False)
