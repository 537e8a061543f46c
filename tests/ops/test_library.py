"""Test the parts that all ops share: the device on which kernels are launched, and the seeds of dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.generation.cache import KVCache
from gpt_fast.generation.sampling import Sampling
from gpt_fast.generation.steps import TorchStep
from gpt_fast.ops import _library
from gpt_fast.training.engine import randomness

# ---- devices ---------------------------------------------------------------------------------------------------------


class OnSecondGPU(Tensor):
    """CPU tensor that claims to be on cuda:1, so that the tests need no GPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", 1))

    def get_device(self) -> int:
        return 1


class FakeCUDA:
    """Stand-in for `torch.cuda` that records the current device and how often `torch.cuda.device` was entered."""

    def __init__(self, current: int):
        self.current = current
        self.entered = 0

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        self.entered += 1
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def fake_cuda(monkeypatch, request) -> FakeCUDA:
    fake = FakeCUDA(current=request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    return fake


@pytest.fixture
def registered(monkeypatch):
    """Return `registered(launcher)`, which returns the function that the dispatcher calls for a launcher."""

    def register(launcher):
        kernels = {}
        monkeypatch.setattr(_library.LIBRARY, "impl", lambda name, kernel, key: kernels.update({key: kernel}))
        _library.register_triton("layer_norm_forward", launcher)
        return kernels["CUDA"]

    return register


def second_gpu(*shape: int) -> Tensor:
    return torch.zeros(*shape).as_subclass(OnSecondGPU)


ARGUMENTS = {
    "first": lambda x: (x, None, 1.0),
    "after_none": lambda x: (None, 3, x),
    "in_a_list": lambda x: ([None, x], 2),
    "after_an_empty_list": lambda x: ([], (x,)),
}


@pytest.mark.parametrize("place", ARGUMENTS)
@pytest.mark.parametrize(("fake_cuda", "entered"), [(0, 1), (1, 0)], ids=["other", "current"], indirect=["fake_cuda"])
def test_launches_run_on_the_device_of_the_tensors(fake_cuda, registered, place, entered) -> None:
    """Triton launches on the current device, so the op switches to the tensors' device if that is another one."""
    args = ARGUMENTS[place](second_gpu(2))
    before, seen = fake_cuda.current, []
    kernel = registered(lambda *got: seen.append((fake_cuda.current, got)) or "result")
    assert kernel(*args) == "result"
    assert seen == [(1, args)]
    assert fake_cuda.entered == entered and fake_cuda.current == before


@pytest.mark.parametrize("fake_cuda", [0], indirect=True)
@pytest.mark.parametrize("args", [(torch.zeros(2),), (None, 1.0)], ids=["cpu", "no_tensor"])
def test_launches_without_a_cuda_tensor_need_no_device(fake_cuda, registered, args) -> None:
    """CPU tensors, which launchers get in the interpreter, and calls without a tensor need no device."""
    assert registered(lambda *got: len(got))(*args) == len(args)
    assert fake_cuda.entered == 0


@pytest.mark.parametrize(("fake_cuda", "entered"), [(0, 2), (1, 0)], ids=["other", "current"], indirect=["fake_cuda"])
def test_decode_step_is_captured_on_the_device_of_the_model(fake_cuda, monkeypatch, entered) -> None:
    """Streams and graphs are made on the current device.

    torch keeps one stream for all captures, on the device of the first one.
    """
    places = []  # (name of the call, current device at the call)

    class Stream:
        def __init__(self) -> None:
            places.append(("stream", fake_cuda.current))

        def wait_stream(self, other: object) -> None:
            pass

    class Graph:
        def __init__(self) -> None:
            places.append(("graph", fake_cuda.current))

        def register_generator_state(self, generator: object) -> None:
            pass

        def replay(self) -> None:
            places.append(("replay", fake_cuda.current))

    @contextmanager
    def inside(value: object, stream: object = None) -> Iterator[None]:
        if isinstance(value, Graph):
            places.append(("capture", fake_cuda.current))
            assert isinstance(stream, Stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", inside)
    config = GPTConfig(num_tokens=11, hidden_dim=8, num_heads=2, num_layers=1, seq_len=8)
    step = TorchStep(GPTForCausalLM(config), KVCache(config, 1, 8, torch.float32, torch.device("cpu")))
    monkeypatch.setattr(step, "run", lambda *args: places.append(("run", fake_cuda.current)))
    step.tokens = torch.zeros(1, dtype=torch.int64).as_subclass(OnSecondGPU)
    before = fake_cuda.current
    for _ in range(2):  # captured once, replayed twice
        step.advance(GPTForCausalLM(config), torch.zeros(1, dtype=torch.int64), Sampling(), None, None, False)
    assert {device for _, device in places} == {1}
    assert [what for what, _ in places].count("replay") == 2 and [what for what, _ in places].count("graph") == 1
    assert fake_cuda.current == before and fake_cuda.entered == entered


def test_generators_are_restored_on_the_device_that_they_were_saved_from(monkeypatch) -> None:
    """`torch.cuda.set_rng_state` sets the current device's generator unless it gets a device."""
    device, kept = torch.device("cuda", 1), {torch.device("cuda", 1): torch.ones(2, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", kept.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": kept.update({device: state}))
    states = randomness.states(device, rank=0)
    states["random.cuda.0"] = torch.zeros(2, dtype=torch.uint8)
    randomness.restore(states, device)
    assert kept == {device: states["random.cuda.0"]}


# ---- seeds -----------------------------------------------------------------------------------------------------------

RANK_STEP = 0x1E3779B97F4A7C15


@pytest.fixture
def on_rank():
    """Return `on_rank(r)`, which makes this process rank r of a fake process group of 1024 ranks."""

    def join(rank: int) -> None:
        leave()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=1024)

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    yield join
    leave()


def drawn(new_seed=_library.new_seed) -> int:
    torch.manual_seed(7)
    return int(new_seed("cpu"))


def test_every_rank_draws_a_seed_of_its_own(on_rank) -> None:
    """The seed of a rank is the drawn seed plus the rank times a constant, modulo 2^64.

    Without the modulus, the seeds of ranks 9 and higher would overflow.
    """
    alone, seeds = drawn(), []
    for rank in range(1024):
        on_rank(rank)
        seeds.append(drawn())
        assert seeds[-1] == drawn()
        assert (seeds[-1] - alone - rank * RANK_STEP) % 2**64 == 0
    assert seeds[0] == alone and len(set(seeds)) == 1024


@pytest.mark.parametrize("rank", [1, 5, 10, 1023])
def test_compiled_ranks_draw_seeds_of_their_own(on_rank, rank) -> None:
    """A compiled graph holds the rank's offset as a constant, which must fit into a signed 64-bit integer."""
    compiled = [torch.compile(_library.new_seed, fullgraph=True, backend="aot_eager") for _ in range(2)]
    on_rank(0)
    first = drawn(compiled[0])
    on_rank(rank)
    torch.compiler.reset()
    assert (drawn(compiled[1]) - first - rank * RANK_STEP) % 2**64 == 0


@pytest.mark.parametrize("rank", [0, 10, 1023])
def test_models_train_with_dropout_on_every_rank(on_rank, rank) -> None:
    on_rank(rank)
    sizes = {"num_tokens": 11, "hidden_dim": 8, "num_heads": 2, "num_layers": 1, "seq_len": 8}
    config = GPTConfig.preset("gpt2", **sizes, dropout=0.5)
    model, batch = GPTForCausalLM(config), torch.randint(11, (2, 8))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(batch, labels=batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
