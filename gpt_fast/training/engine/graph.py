"""A training step as one CUDA graph: captured once, replayed for every later call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops._library import device_guard

EAGER_CALLS = 2  # kernels are compiled, and the optimizer's state is made, before the capture
Step = Callable[..., Any]


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """Move the learning rates and step counts of `optimizer` to `device`, so that a CUDA graph can hold its step.

    The optimizer is changed in place, and each parameter group gets the option "capturable".

    Returns:
        The learning rate of each parameter group, a float32 tensor [] on `device`, which the group now holds as "lr".

    Raises:
        ValueError: The optimizer has no option "capturable", because it decides something on the host, as
            `torch.optim.Muon` does. It is then unchanged.
    """
    if any("capturable" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"gpt_fast.GraphedStep: optimizer is a {type(optimizer).__name__}, which no graph can hold; "
            "expected one with the option capturable, such as torch.optim.AdamW"
        )
    rates = []
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=device)
        rates.append(group["lr"])
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)
    return rates


class GraphedStep:
    """A training step that runs as one CUDA graph, so that the host launches once instead of some hundred times.

    The first two calls run `step` as it is, and they count. The third call captures it. Every later call copies its
    tensors to where the graph reads them, fills in the learning rates and replays. Results equal those of `step`.
    Dropout differs from call to call, because the graph advances torch's generator as `step` does.

    Args:
        step: A whole update. `step(*tensors)` zeroes the gradients by `zero_grad(set_to_none=True)`, computes a loss
            and its gradients, clips, calls `optimizer.step()`, and returns a tensor or a tuple of tensors of the
            device. It must not read a value of the device, as `.item()`, `float(loss)` and `print(loss)` do.
        *optimizers: Optimizers that `step` calls. Their learning rates become tensors on the device. A loop or a
            scheduler may still set `group["lr"]` between calls. The capture fixes other options.

    Shape:
        Each tensor has the shape and dtype that it had in the first call.

    Returns:
        The results of `step`, as copies that the next call leaves alone.

    Raises:
        ValueError: A tensor is not on a CUDA device, or its shape or dtype differs from the first call; a process group
            has several ranks; an optimizer cannot be captured; or parameters, optimizer state or options were replaced
            after the capture.
        RuntimeError: No capture allows a part of `step`, such as reading a value.

    Example:
        ```python
        import torch
        import gpt_fast
        from gpt_fast.training import GraphedStep

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        model = gpt_fast.GPTForCausalLM(config).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(tokens):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        graphed = GraphedStep(step, optimizer)
        for _ in range(4):
            loss = graphed(torch.randint(100, (8, 32), device="cuda"))
        ```

    Note:
        The graph keeps the memory of one step, gradients included, as long as this object lives. Modes of the model
        (`train()`, `eval()`) and every other condition of `step` in Python stay as they were at the capture.
    """

    def __init__(self, step: Step, *optimizers: torch.optim.Optimizer):
        if not torch.cuda.is_available():
            raise ValueError("gpt_fast.GraphedStep: this PyTorch sees no CUDA device; expected one, to capture a graph")
        if (ranks := _ranks()) > 1:
            raise ValueError(f"gpt_fast.GraphedStep: the process group has {ranks} ranks; expected one process alone")
        self._step = step
        self._optimizers = optimizers
        self._rates = [make_capturable(optimizer, _device_of(optimizer)) for optimizer in optimizers]
        self._inputs: dict[str, Tensor] = {}
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side: torch.cuda.Stream | None = None
        self._results: Any = None
        self._captured: list[Any] = []

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run one training step on the given CUDA tensors, eagerly or as a CUDA graph.

        The first two calls run the step eagerly. The third captures it as a graph, which that call and all later ones
        replay.

        Args:
            *args: Tensors that the step takes by position.
            **kwargs: Tensors that the step takes by keyword.

        Returns:
            Copies of the results of the step, a tensor or a tuple of tensors.

        Raises:
            ValueError: There is no tensor, or one is not on a CUDA device; the tensors differ from those of the first
                call in name, order, shape, dtype or device; or parameters, optimizer state or options, except the
                learning rate, were replaced after the capture.
            RuntimeError: The step cannot be captured, because it reads a value of the device, for example.
        """
        tensors = {f"tensor {i}": x for i, x in enumerate(args)} | kwargs
        self._check(tensors)
        device = next(iter(tensors.values())).device
        with device_guard(device.index):
            self._take_inputs(tensors)
            self._take_rates()
            if self._calls < EAGER_CALLS:
                results = self._run_eagerly(len(args))
            else:
                if self._graph is None:
                    self._capture(len(args))
                elif self._captured != self._what_a_graph_reads():
                    raise ValueError(
                        "gpt_fast.GraphedStep: parameters, optimizer state or options were replaced after the capture; "
                        "expected no change but of learning rates; make a new GraphedStep after one"
                    )
                assert self._graph is not None
                self._graph.replay()
                results = self._results
            self._calls += 1
            return tuple(x.clone() for x in results) if isinstance(results, tuple) else results.clone()

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Validate the tensors of a call, given by name, against those of the first call, if there was one.

        Raises:
            ValueError: There are no tensors, a value is not a tensor on a CUDA device, or the names, their order, or a
                shape, dtype or device differs from the first call.
        """
        if not tensors:
            raise ValueError("gpt_fast.GraphedStep: the call has no tensors; expected those that change between calls")
        if self._inputs and list(tensors) != list(self._inputs):
            raise ValueError(
                f"gpt_fast.GraphedStep: the call has {', '.join(tensors)}; expected {', '.join(self._inputs)}, as in "
                "the first call"
            )
        for name, x in tensors.items():
            if not isinstance(x, Tensor) or not x.is_cuda:
                where = f"on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(f"gpt_fast.GraphedStep: {name} is {where}; expected a tensor on a CUDA device")
            held = self._inputs.get(name)
            if held is not None and (x.shape != held.shape or x.dtype != held.dtype or x.device != held.device):
                raise ValueError(
                    f"gpt_fast.GraphedStep: {name} is {x.dtype} {list(x.shape)} on {x.device}; expected {held.dtype} "
                    f"{list(held.shape)} on {held.device}, as in the first call"
                )

    def _take_inputs(self, tensors: dict[str, Tensor]) -> None:
        """Copy `tensors`, given by name, into the tensors of the same names that the graph reads.

        The first call allocates the tensors that the graph reads.
        """
        if not self._inputs:
            self._inputs = {name: torch.empty_like(x, requires_grad=False) for name, x in tensors.items()}
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for name, x in tensors.items():
            held, given = by_dtype.setdefault(x.dtype, ([], []))
            held.append(self._inputs[name])
            given.append(x)
        for held, given in by_dtype.values():  # a launch for each dtype
            torch._foreach_copy_(held, given)

    def _take_rates(self) -> None:
        """Copy learning rates that were set since the last call into the tensors that the graph reads.

        A parameter group whose "lr" is another number or tensor gets the graph's tensor as its "lr" again.
        """
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if group["lr"] is not rate:
                    rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
                    group["lr"] = rate

    def _call_step(self, positional: int) -> Any:
        """Return the results of the step, called on the tensors that the graph reads.

        The first `positional` tensors are passed by position, all others by keyword.
        """
        values = list(self._inputs.items())
        return self._step(*(x for _, x in values[:positional]), **dict(values[positional:]))

    def _run_eagerly(self, positional: int) -> Any:
        """Return the results of the step, run eagerly. The first `positional` inputs are passed by position.

        The step runs on the stream of the later capture, so that libraries allocate their workspaces for that stream.
        The host does not wait: the current stream waits for that one.
        """
        if self._side is None:
            self._side = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            results = self._call_step(positional)
        current.wait_stream(self._side)
        return results

    def _capture(self, positional: int) -> None:
        """Capture the step as a CUDA graph, with the first `positional` inputs passed by position.

        The step is recorded, not run. The gradients of all optimizers are set to None first. The graph, and the results
        that it will write, are kept in this object.

        Raises:
            RuntimeError: The step cannot be captured, because it reads a value of the device, for example.
        """
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)  # gradients are allocated again, in the graph's memory
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use CUDA meanwhile, as a DataLoader's does that pins memory.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                self._results = self._call_step(positional)
        except RuntimeError as error:
            raise RuntimeError(
                f"gpt_fast.GraphedStep: the step cannot be captured ({str(error).splitlines()[0]}); expected one that "
                "reads no value of the device and makes no tensor from a number of the host"
            ) from error
        self._graph, self._captured = graph, self._what_a_graph_reads()

    def _what_a_graph_reads(self) -> list[Any]:
        """Return a list that shows, by comparison with an earlier one, whether the optimizers were changed in between.

        It holds for each parameter group a dict of its options, without "params" and "lr", then the addresses of its
        first parameter and of that parameter's state. If the list differs from the one at the capture, the graph would
        read memory that is no longer used. Loading a state or moving a model replaces all tensors of a group, so its
        first parameter suffices.
        """
        found: list[Any] = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                found.append({name: value for name, value in group.items() if name not in ("params", "lr")})
                for parameter in group["params"][:1]:
                    state = optimizer.state.get(parameter, {})
                    found += [parameter.data_ptr(), *(x.data_ptr() for x in state.values() if isinstance(x, Tensor))]
        return found


def _device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Return the CUDA device of an optimizer's parameters. Raise `ValueError` if they are not on one CUDA device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ValueError(
            f"gpt_fast.GraphedStep: the optimizer's parameters are on {', '.join(sorted(map(str, devices)))}; "
            "expected one CUDA device"
        )
    return devices.pop()


def _ranks() -> int:
    """Return the number of ranks of PyTorch's process group, or 1 without a group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
