"""Test the stand-in itself: it refuses the calls that CUDA refuses.

Other tests assert that no call is refused, which would prove nothing if the stand-in accepted every call.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from tools.fakecuda.record import watch


@triton.jit
def _copy_kernel(n, x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    total += tl.load(y_ptr + offs, mask=offs < n, other=0.0) + tl.load(z_ptr + offs, mask=offs < n, other=0.0)
    tl.store(out_ptr + offs, total, mask=offs < n)


@triton.jit
def _tile_kernel(x_desc, out_ptr, BLOCK: tl.constexpr):
    tile = x_desc.load([0, 0])
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.sum(tile.to(tl.float32), axis=1))


def launch(*tensors: torch.Tensor, grid: tuple[int, ...] = (2,)) -> None:
    _copy_kernel[grid](100, *tensors, BLOCK=64)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.zeros(128, device="cuda:0")


@pytest.fixture
def side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def test_records_a_launch(x: torch.Tensor) -> None:
    with watch() as seen:
        launch(x, x, x, x)
    (entry,) = seen.entries
    assert (entry.kind, entry.name, entry.grid, entry.device) == ("triton", "_copy_kernel", (2, 1, 1), 0)
    assert seen.refusals == []


@pytest.mark.parametrize("place", range(4))
def test_a_pointer_of_another_device_is_refused(x: torch.Tensor, place: int) -> None:
    """A tensor on another device is refused as any argument, because Triton launches on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    tensors = [x] * 4
    tensors[place] = x.to("cuda:1")
    with watch() as seen:
        launch(*tensors)
    assert [f"argument {place + 1} is of device 1" in line for line in seen.refusals] == [True]


def test_a_grid_over_the_limit_is_refused(x: torch.Tensor) -> None:
    with watch() as seen, pytest.raises(RuntimeError, match="invalid argument"):
        launch(x, x, x, x, grid=(1, 65536))
    assert "the grid is larger" in seen.refusals[0]


def compiled_for(capability: int) -> triton.compiler.CompiledKernel:
    signature = {"n": "i32", "x_ptr": "*fp32", "y_ptr": "*fp32", "z_ptr": "*fp32", "out_ptr": "*fp32"}
    source = ASTSource(_copy_kernel, signature | {"BLOCK": "constexpr"}, {"BLOCK": 64})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def test_machine_code_of_another_architecture_is_refused() -> None:
    major, minor = torch.cuda.get_device_capability()
    here, load = 10 * major + minor, triton.runtime.driver.active.utils.load_binary
    kernel = compiled_for(here)
    with watch() as seen:
        _, _, registers, *_ = load(kernel.name, kernel.asm["cubin"], 0, 0)
    assert seen.refusals == []
    assert 8 <= registers <= 255, "expected the registers that the cubin names"
    other = 80 if here >= 90 else 90
    with watch() as seen, pytest.raises(RuntimeError, match="no kernel image"):
        load(kernel.name, compiled_for(other).asm["cubin"], 0, 0)
    assert f"the image is for sm_{other}, the device is sm_{here}" in seen.refusals[0]


@pytest.mark.parametrize("call", ["synchronize", "item", "query"])
def test_a_call_that_a_capture_forbids_is_refused(x: torch.Tensor, side: torch.cuda.Stream, call: str) -> None:
    event = torch.cuda.Event()
    event.record()
    calls = {"synchronize": torch.cuda.synchronize, "item": x[0].item, "query": event.query}
    graph = torch.cuda.CUDAGraph()
    with watch() as seen, pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(graph, stream=side):
        calls[call]()
    assert seen.refusals


def test_work_that_a_capture_does_not_wait_for_is_refused(x: torch.Tensor, side: torch.cuda.Stream) -> None:
    other = torch.cuda.Stream()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                x.add_(1)

    with watch() as seen, pytest.raises(RuntimeError, match="Unjoined"):
        capture()
    assert "does not wait for" in seen.refusals[0]


def test_a_capture_that_joins_its_streams_is_allowed(x: torch.Tensor, side: torch.cuda.Stream) -> None:
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with watch() as seen:
        with torch.cuda.graph(graph, stream=side):
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                x.add_(1)
            torch.cuda.current_stream().wait_stream(other)
        graph.replay()
    assert seen.refusals == []
    assert [entry.name for entry in seen.of("graph")] == ["1 nodes"]
    assert sum(entry.captured for entry in seen.of("kernel")) == 1


def test_a_misaligned_tensor_map_is_refused(x: torch.Tensor) -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor maps before sm_90")
    out = torch.zeros(64, device="cuda:0")
    wide = torch.zeros(64, 72, dtype=torch.bfloat16, device="cuda:0")
    with watch() as seen:
        _tile_kernel[(1,)](TensorDescriptor(wide, [64, 64], [72, 1], [64, 64]), out, BLOCK=64)
    assert seen.refusals == []
    descriptor = TensorDescriptor(wide, [64, 64], [72, 1], [64, 64])
    descriptor.base = wide.flatten()[1:4097].view(64, 64)  # set later, because the constructor refuses it
    with watch() as seen, pytest.raises(RuntimeError, match="invalid argument"):
        _tile_kernel[(1,)](descriptor, out, BLOCK=64)
    assert "multiple of 16 bytes" in seen.refusals[0]


def test_memory_is_limited() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda:0")


def test_reading_a_value_is_a_wait(x: torch.Tensor) -> None:
    with watch() as seen:
        x[0].item()
    assert [entry.name for entry in seen.of("sync")] == ["cudaStreamSynchronize"]
    with watch() as seen:
        torch.tensor(1.0, device="cuda:0")
    assert [entry.name for entry in seen.of("sync")] != []
    with watch() as seen:
        torch.zeros(4, pin_memory=True).to("cuda:0", non_blocking=True)
    assert seen.of("sync") == []
