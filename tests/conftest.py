"""Fixtures that every op's tests use.

One test file serves the C++ kernels, Triton in the interpreter and Triton on CUDA.
"""

import importlib
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import gpt_fast
import gpt_fast.reference

pytest_plugins = ("tests.command_line",)  # the fixtures cli and data

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Dtypes to which a norm may round its result for a matrix product. Triton's interpreter truncates to bfloat16, while a
# GPU rounds.
PRODUCT_DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]


def pytest_configure() -> None:
    """Let processes that tests start be interrupted, also if a shell started these tests in the background.

    Such a shell has SIGINT ignored in its children, and a process that ignores it hands that on.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Return "cpu" (C++, or Triton if TRITON_INTERPRET=1), or "cuda" on a machine with a CUDA device."""
    return request.param


@pytest.fixture
def implementation(device: str) -> str:
    """Return the implementation that a fused op has to run on `device`. Tests must not pass on another one."""
    if device == "cuda" or INTERPRETED:
        return "triton"
    return "reference" if os.environ.get("GPT_FAST_NO_CPP") == "1" else "cpp"


@pytest.fixture
def check_implementation(device: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return `check(op, call)`, which asserts that `call()` runs the implementation under test and no other.

    `call()` has to run the op's backward too, if the op has one.
    """

    def check(op: str, call: Callable[[], object]) -> None:
        assert gpt_fast.ops.serving(op, device) == implementation
        launched, launchers = [], []
        if implementation == "triton":
            kernel = importlib.import_module(f"gpt_fast.kernels.{op}")
            launchers = [name for name in ("forward", "backward") if hasattr(kernel, name)]
            for name in launchers:
                launcher = getattr(kernel, name)
                monkeypatch.setattr(kernel, name, lambda *a, n=name, f=launcher: (launched.append(n), f(*a))[1])
        if implementation != "reference":
            monkeypatch.setattr(gpt_fast.reference, op, lambda *a, **k: pytest.fail(f"the reference of {op} ran"))
        call()
        assert launched == launchers

    return check


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` and `at::empty` return NaN, so that a value that a kernel forgets to write fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def far_apart() -> Callable:
    """Return `far_apart(x, dim=0)`, which copies x to slices along `dim` that are far apart in memory.

    The last slice lies more than 2^31 elements behind the first. On a CPU only the pages that the copy writes take
    memory.
    """

    def spread(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        strides = list(x.detach().movedim(dim, 0).contiguous().movedim(0, dim).stride())
        strides[dim] = 2**31 // (x.shape[dim] - 1) + 64
        size = (strides[dim] * (x.shape[dim] - 1) + x.numel()) * x.element_size()
        zeros = (
            torch.from_numpy(np.zeros(size, dtype=np.uint8))
            if x.device.type == "cpu"
            else torch.zeros(size, dtype=torch.uint8, device=x.device)
        )
        view = zeros.view(x.dtype).as_strided(x.shape, strides).copy_(x.detach())
        return view.requires_grad_(x.requires_grad)

    return spread


@pytest.fixture
def threads() -> Iterator:
    """Yield a function that sets the number of threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(threads: Callable[[int], None]) -> None:
    threads(2)


@pytest.fixture
def thread_counts() -> tuple[int, ...]:
    """Return the numbers of threads for which every run must give the same bits.

    The interpreter is slow and runs one program after the other, so that one run suffices. On a GPU the number of
    threads changes nothing, but three runs can show programs that race.
    """
    return (1,) if INTERPRETED else (1, 2, 3)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread, for modules that train tiny models.

    On tiny models two threads spend their time waiting for each other. On a busy machine they take twenty times as
    long as one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_leftover_switches() -> Iterator[None]:
    yield
    gpt_fast.check_values(False)
    torch._dynamo.reset()
