"""One update: forward and backward over the parts of a batch, in the precision asked for, clipping, the optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...data.batches import Batch
from ...heads import Head
from .distributed import World
from .graph import GraphedStep
from .optimizer import hidden_matrices, layer_factors, make_muon, make_optimizer
from .transfer import Sender, Sent

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_SCALE, GROWTH_EVERY = 2.0**16, 2000


@dataclass(frozen=True)
class EngineSettings:
    precision: str = "float32"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    compile: bool = False
    graph: bool = False
    checkpoint_activations: bool = False
    optimizer: str = "adamw"  # or muon, for the hidden matrices
    muon_lr: float | None = None  # its peak rate; None is AdamW's
    z_loss: float = 0.0
    layer_decay: float = 1.0

    @classmethod
    def of(cls, settings: Any) -> EngineSettings:
        """Return an `EngineSettings` whose fields have the values of the attributes of the same names in `settings`.

        A field for which `settings` has no attribute keeps its default.
        """
        names = [field.name for field in fields(cls) if hasattr(settings, field.name)]
        return cls(**{name: getattr(settings, name) for name in names})


class Outcome(NamedTuple):
    """Result of one update, still on the device.

    Attributes:
        loss: Mean loss over all parts and ranks.
        norm: Norm of the gradient before clipping.
        skipped: True if either is not finite, and nothing was updated.
    """

    loss: Tensor
    norm: Tensor
    skipped: Tensor


class Engine:
    """A model with its optimizer on one rank.

    An update is skipped on the device: the fused AdamW reads `found_inf` itself, so nobody waits for a flag. Muon reads
    no flag, so with it the host waits for one each update. The loss
    scale is not `torch.amp.GradScaler`'s, which does not look at the loss; docs/log.md has the comparison.
    """

    def __init__(self, model: Head, lr: float, settings: EngineSettings, world: World | None = None):
        self.world = world or World()
        self.settings = settings
        self.device = next(model.parameters()).device
        self.dtype = PRECISIONS[settings.precision]
        self.model = model
        model.trunk.checkpoint_activations = settings.checkpoint_activations
        model.z_loss = settings.z_loss
        # FSDP2 replaces the parameters, so it comes before the optimizer.
        self.parallel = self.world.wrap(model, self.dtype)
        hidden = hidden_matrices(model) if settings.optimizer == "muon" else []
        factors = layer_factors(model, settings.layer_decay)
        betas = (settings.beta1, settings.beta2)
        self.optimizer = make_optimizer(model, lr, settings.weight_decay, betas, hidden, factors)
        muon_lr = lr if settings.muon_lr is None else settings.muon_lr
        self.muon = make_muon(hidden, muon_lr, settings.weight_decay, factors) if hidden else None
        self.muon_ratio = muon_lr / lr if lr else 1.0
        self.forward: nn.Module = torch.compile(self.parallel) if settings.compile else self.parallel  # type: ignore[assignment]
        self._sender = Sender(self.device)
        self.scale = torch.tensor(FIRST_SCALE if self.dtype == torch.float16 else 1.0, device=self.device)
        self.growth = torch.zeros((), device=self.device)  # updates since the scale last changed
        optimizers = [self.optimizer] if self.muon is None else [self.optimizer, self.muon]
        self._graphed = GraphedStep(self._compute_named, *optimizers) if settings.graph else None

    def send(self, batches: Sequence[Batch]) -> Sent:
        """Start copying `batches`, this rank's micro-batches of an update, to the device.

        Return a handle, which `update` takes in place of the batches.
        """

        def count(batch: Batch) -> Tensor:
            return self.model.loss_counts(**batch.inputs()) * (batch.weight > 0)

        return self._sender.send(batches, count)

    def update(self, batches: Sequence[Batch] | Sent, lr: float) -> Outcome:
        """Make one optimizer step on the gradient of the loss over all `batches` of all ranks.

        `batches` are the micro-batches of this rank, or the handle that `send` returned for them. `lr` is AdamW's
        learning rate, before the factor of each parameter group. Muon's rate keeps its ratio to it. Each term of the
        loss is the mean over all of its predictions, so the gradient does not depend on how the batch is divided.
        Predictions in a batch whose `weight` is 0 do not count. The model is left in training mode.

        Return an `Outcome` of scalars on the device: (mean loss, norm of the gradient before clipping, skipped).
        `skipped` is 1.0 if the loss or the norm is not finite, and then no weight was changed; else it is 0.0. On CUDA
        the host does not wait if the batches come from the CPU or from `send`, unless Muon trains.
        """
        parts, counts = self._sender.receive(batches if isinstance(batches, Sent) else self.send(batches))
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = float(np.float32(lr * group["lr_factor"]))  # as a graph holds it, so that both agree
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = lr * self.muon_ratio * group["lr_factor"]
        if self._graphed is None:
            return self._compute([part.inputs() for part in parts], counts)
        tensors = {f"{name} of part {i}": x for i, part in enumerate(parts) for name, x in part.inputs().items()}
        return Outcome(*self._graphed(counts=counts, **tensors).unbind())

    def _compute_named(self, counts: Tensor, **tensors: Tensor) -> Tensor:
        """Make one update on `tensors`, for the CUDA graph. Return a tensor [3]: loss, gradient norm, 1 if skipped.

        The names of `tensors` are "tokens of part 0", "labels of part 0" and so on: an argument of the model's forward
        pass and the index of its micro-batch. `counts` [parts, terms] is the number of predictions of each term of the
        loss in each micro-batch.
        """
        parts: list[dict[str, Tensor]] = [{} for _ in range(len(counts))]
        for name, tensor in tensors.items():
            field, _, index = name.partition(" of part ")
            parts[int(index)][field] = tensor
        return torch.stack(self._compute(parts, counts))

    def _compute(self, parts: Sequence[dict[str, Tensor]], counts: Tensor) -> Outcome:
        """Make one update on `parts`. Return (loss, gradient norm before clipping, skipped), scalars on the device.

        The loss is the mean over all ranks, and `skipped` is 1.0 for an update without effect, else 0.0. An element of
        `parts` holds the arguments of the model's forward pass for one micro-batch. `counts` [parts, terms] is the
        number of predictions of each term of the loss in each micro-batch. A CUDA graph of this function may be
        replayed in its place, so it keeps no number on the host.
        """
        self.optimizer.zero_grad(set_to_none=True)  # FSDP's model may hold other parameters at this moment
        if self.muon is not None:
            self.muon.zero_grad(set_to_none=True)
        total_counts = self.world.total(counts.sum(0))
        shares = counts / torch.where(
            total_counts > 0, total_counts, 1
        )  # [parts, terms]; weights may sum to less than 1
        total = torch.zeros((), device=self.device)
        for index, inputs in enumerate(parts):
            with self.world.synchronised(self.parallel, index == len(parts) - 1):
                with self.autocast():
                    loss = self.forward(**inputs, loss_weights=shares[index]).loss.float()
                # DDP and FSDP average over the ranks what is meant to be a sum.
                (loss * (self.scale * self.world.size)).backward()
            total += loss.detach()
        return self._step(total)

    def autocast(self) -> AbstractContextManager[object]:
        """Return autocast to the training's dtype, or an empty context for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _step(self, loss: Tensor) -> Outcome:
        """Clip the gradients and step the optimizers, or skip the update if the loss or the gradient is not finite.

        `loss` is this rank's share: the shares of all ranks sum to the mean loss. The model holds the gradient of that
        sum times the float16 loss scale; clipping changes it in place. In float16 the loss scale is adjusted
        afterwards. Return (loss, norm, skipped), scalars on the device. The returned `loss` is the sum of the shares.
        `norm` is the norm of the gradient before clipping, without the loss scale. `skipped` is 1.0 if the update was
        skipped, else 0.0.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self.world.full(nn.utils.get_total_norm([p.grad for p in parameters])) / self.scale  # type: ignore[misc]
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.world.size > 1:
            loss, bad = self.world.total(torch.stack([loss, bad.float()]))
        skipped = (bad > 0).float()
        nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        self.optimizer.grad_scale = self.world.replicated(self.scale)  # type: ignore[attr-defined]
        self.optimizer.found_inf = self.world.replicated(skipped)  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.muon is not None and not bool(skipped):
            if self.dtype == torch.float16:
                torch._foreach_div_(
                    [p.grad for g in self.muon.param_groups for p in g["params"] if p.grad is not None], self.scale
                )
            self.muon.step()
        if self.dtype == torch.float16:
            self._rescale(skipped > 0)
        return Outcome(loss, norm, skipped)

    def _rescale(self, overflow: Tensor) -> None:
        """Halve the float16 loss scale if `overflow` (bool []), else double it after 2,000 updates without a change.

        The scale and the count of updates are changed in place on the device, so that the host does not wait.
        """
        growth = torch.where(overflow, 0.0, self.growth + 1)
        grows = growth >= GROWTH_EVERY
        self.scale.copy_(torch.where(overflow, self.scale / 2, torch.where(grows, self.scale * 2, self.scale)))
        self.growth.copy_(torch.where(grows, 0.0, growth))

    def state(self) -> dict[str, Tensor]:
        """Return {name: tensor} for the model and its optimizers, from which training resumes.

        The names are "model.NAME" and "optimizer.KEY.NAME" for the parameter NAME and the entry KEY of its optimizer
        state, such as "exp_avg". "scale" and "growth" are the float16 loss scale and the updates since it changed. The
        tensors are the live ones: copying into them restores the state. Optimizer state of trainable parameters that
        does not exist yet is created as zeros; frozen parameters have none. States of random generators are not among
        them. With FSDP the tensors are sharded.
        """
        self.world.reshard(self.model)
        tensors: dict[str, Tensor] = {"scale": self.scale, "growth": self.growth}
        hidden = {id(p) for group in self.muon.param_groups for p in group["params"]} if self.muon else set()
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            if self.muon is not None and id(parameter) in hidden:
                moments = self.muon.state[parameter]
                if not moments:
                    moments["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            else:
                moments = self.optimizer.state[parameter]
            if not moments and parameter.requires_grad:
                moments["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                moments["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                moments["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for key, value in moments.items():
                tensors[f"optimizer.{key}.{name}"] = value.detach()
        return tensors

    def whole_model(self) -> Head:
        """Return the model with unsharded weights, for saving. Every rank must call this.

        With FSDP it is a copy on the CPU, else the model in training itself.
        """
        if self.world.size == 1 or self.world.strategy == "ddp":
            return self.model
        tensors = {name: self.world.full(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        whole = type(self.model)(self.model.config)
        whole.load_state_dict(tensors)
        return whole
