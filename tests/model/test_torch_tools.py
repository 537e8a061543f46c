"""Test PyTorch's tools on this library's and accelerated models: compile, export, func, checkpointing and ranks.

The first tests measure the import of the package.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gpt_fast
from gpt_fast import GPTConfig, GPTForCausalLM, GPTModel, _transforms
from tests import hf_models, two_ranks

SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 2, "seq_len": 20}


def ours(preset: str = "gpt2", dropout: float = 0.0, **options) -> GPTForCausalLM:
    return GPTForCausalLM(GPTConfig.preset(preset, **SIZES | options, dropout=dropout))


def accelerated(name: str = "GPT2LMHeadModel", dropout: float = 0.0) -> nn.Module:
    model = hf_models.make(name, dropout, use_cache=False)
    gpt_fast.accelerate(model, strict=True)
    return model


MODELS = [
    pytest.param(ours, id="gpt2"),
    pytest.param(lambda **options: ours("gpt1", **options), id="gpt1"),
    pytest.param(accelerated, id="accelerated_gpt2"),
    pytest.param(lambda **options: accelerated("OpenAIGPTLMHeadModel", **options), id="accelerated_gpt1"),
]


def tokens(T: int = 11, B: int = 2) -> Tensor:
    return torch.randint(61, (B, T))


def gradients(model: nn.Module, batch: Tensor, loss: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (model(batch, labels=batch).loss if loss is None else loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- import ----------------------------------------------------------------------------------------------------------

IMPORT = """
import json, sys, time
start = time.process_time()
import torch
torch_seconds, before = time.process_time() - start, set(sys.modules)
start = time.process_time()
import gpt_fast
seconds = time.process_time() - start
print(json.dumps({"added": sorted(set(sys.modules) - before), "ratio": 1 + seconds / torch_seconds}))
"""


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    """Import torch and then gpt_fast in three new processes, and return what each measured.

    Bytecode is cached, as in any installation.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    root = Path(__file__).resolve().parents[2]
    return [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", IMPORT], cwd=root, env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]


def test_import_adds_only_our_modules_to_those_of_torch(imports) -> None:
    """The import loads no Dynamo, Inductor, SymPy, Triton, transformers or tools of torch.distributed."""
    light = {"gpt_fast", "gpt_fast_settings", "safetensors", *sys.stdlib_module_names}
    assert [name for name in imports[0]["added"] if name.partition(".")[0] not in light] == []


def test_import_takes_hardly_longer_than_that_of_torch(imports) -> None:
    """The import takes at most 10 % longer than that of torch, in CPU time of the process, the best of three."""
    assert min(run["ratio"] for run in imports) <= 1.10


def test_constant_in_graphs_is_the_public_decorator_without_the_import_of_dynamo() -> None:
    """`constant_in_graphs` sets the private attribute that `torch.compiler.assume_constant_result` sets.

    A new PyTorch may rename that attribute.
    """

    def ours() -> int:
        return 1

    def public() -> int:
        return 1

    assert _transforms.constant_in_graphs(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(public)) != {}


# ---- compile and export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_one_graph_for_every_length(make) -> None:
    model = make()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda batch: model(batch, labels=batch).loss, fullgraph=True, backend=counter, dynamic=True
    )
    counts = []
    for T in (11, 7, 17):
        batch = tokens(T)
        wanted = gradients(model, batch)
        got = gradients(model, batch, compiled(batch))
        counts.append(counter.frame_count)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert counts[0] == counts[2], "it was compiled again for another length"


def test_blocks_compiled_one_by_one() -> None:
    """`Module.compile` works on a block that returns several results and leaves its last addition to the next block."""
    model = accelerated()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    results = []
    for compiled in (False, True):
        for block in model.transformer.h if compiled else ():
            block.compile(backend=counter, fullgraph=True, dynamic=True)
        torch.manual_seed(0)
        results.append([gradients(model, tokens(T)) for T in (11, 7)])
    assert counter.frame_count >= len(model.transformer.h)
    for wanted, got in zip(*results, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("make", [MODELS[0], MODELS[2]])
def test_compiled_by_inductor(make) -> None:
    model = make()
    compiled = torch.compile(lambda batch: model(batch, labels=batch).loss, fullgraph=True, dynamic=True)
    for T in (11, 7):
        batch = tokens(T)
        wanted, got = gradients(model, batch), gradients(model, batch, compiled(batch))
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", MODELS)
def test_export_with_a_free_length(make) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make().eval()

        def forward(self, batch: Tensor) -> Tensor:
            return self.model(batch).logits

    model = Logits()
    program = torch.export.export(
        model, (tokens(),), dynamic_shapes={"batch": {1: torch.export.Dim("T", min=2, max=SIZES["seq_len"])}}
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert "gpt_fast.attention_forward.default" in names and "gpt_fast.mlp_forward.default" in names
    for T in (11, 5, 20):
        batch = tokens(T)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(batch), model(batch))


def test_eager_and_compiled_masks_agree_for_an_explicit_seed() -> None:
    """With an explicit seed, eager and compiled masks agree. Otherwise compiled code draws another seed than eager."""
    trunk = GPTModel(GPTConfig.preset("gpt2", **SIZES, dropout=0.3))
    batch, seed = tokens(), torch.tensor([1234])
    compiled = torch.compile(lambda b, s: trunk(b, seed=s), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch, seed), trunk(batch, seed=seed))
    assert not torch.equal(trunk(batch, seed=torch.tensor([1235])), trunk(batch, seed=seed))


@pytest.mark.parametrize("make", MODELS)
def test_manual_seed_governs_dropout(make) -> None:
    model, batch = make(dropout=0.2), tokens()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(gradients(model, batch))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(
        *(result["trunk.pos_emb" if "trunk.pos_emb" in result else next(iter(result))] for result in results[1:])
    )


# ---- functions of parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_functional_call(make) -> None:
    model, other, batch = make(), make(), tokens()
    parameters = dict(other.named_parameters())
    got = torch.func.functional_call(model, parameters, (batch,), {"labels": batch}).loss
    assert torch.equal(got, other(batch, labels=batch).loss)
    assert not torch.equal(got, model(batch, labels=batch).loss)
    got.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in parameters.values())


@pytest.mark.parametrize("make", MODELS)
def test_func_grad(make) -> None:
    """`torch.func.grad` runs the kernels and gives the bits of backward.

    Under `vmap` it runs the reference and gives per-row gradients, whose mean is the gradient of the batch.
    """
    model, batch = make(), tokens()
    wanted = gradients(model, batch)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gpt_fast.ops._library._WARNED.clear()

    def loss(parameters: dict, batch: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (batch,), {"labels": batch}).loss

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gpt_fast")  # the reference warns when it runs
        got = torch.func.grad(loss)(parameters, batch)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    with pytest.warns(UserWarning, match=r"torch\.func's transforms but one grad or vjp, the pure-PyTorch reference"):
        rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batch[:, None])
    for name, value in wanted.items():
        torch.testing.assert_close(rows[name].mean(0), value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", MODELS)
def test_double_backward_says_what_to_do(make) -> None:
    model, batch = make(), tokens()

    def twice() -> None:
        loss = model(batch, labels=batch).loss
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in first).backward()

    with pytest.raises(NotImplementedError, match=r"double backward is not implemented.*gpt_fast\.use_reference\(\)"):
        twice()
    with gpt_fast.use_reference():
        twice()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("make", MODELS)
def test_any_subset_of_parameters_may_be_frozen(make) -> None:
    model, batch = make(), tokens()
    wanted = gradients(model, batch)
    names = list(wanted)
    generator = torch.Generator().manual_seed(0)
    subsets = [torch.rand(len(names), generator=generator) < share for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for subset in [*subsets, torch.arange(len(names)) == 0, torch.arange(len(names)) == len(names) - 1]:
        frozen = {name for name, there in zip(names, subset.tolist(), strict=True) if there}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        got = gradients(model, batch)
        assert got.keys() == wanted.keys() - frozen
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_accumulated_gradients_are_their_sum(make) -> None:
    model, a, b = make(), tokens(), tokens(7)
    parts = [gradients(model, batch) for batch in (a, b)]
    model.zero_grad(set_to_none=True)
    for batch in (a, b):
        model(batch, labels=batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parts[0][name] + parts[1][name])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(make, dtype: torch.dtype) -> None:
    model, batch = make(), tokens()
    wanted = model(batch, labels=batch).loss
    with torch.autocast("cpu", dtype):
        loss = model(batch, labels=batch).loss
    assert loss.dtype == torch.float32
    assert 0 < (loss - wanted).abs() < 0.05
    got = gradients(model, batch, loss)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preset", ["gpt1", "gpt2"])
def test_activation_checkpointing_with_dropout(preset: str, reentrant: bool) -> None:
    """PyTorch's checkpointing of each decoder, which draws its own dropout seed, gives the same bits of gradients."""
    model, batch = ours(preset, dropout=0.2), tokens()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = model.trunk.token_emb(batch)
        for decoder in model.trunk.decoders:
            x = checkpoint(decoder, x, use_reentrant=reentrant) if checkpointed else decoder(x)
        model.zero_grad()
        x.square().sum().backward()
        results.append([parameter.grad for parameter in model.trunk.decoders.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("make", MODELS)
def test_copies_are_independent(make) -> None:
    model, batch = make(), tokens()
    twin = copy.deepcopy(model)
    wanted = model(batch, labels=batch).loss
    assert torch.equal(twin(batch, labels=batch).loss, wanted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(batch, labels=batch).loss, wanted)
    assert not torch.equal(twin(batch, labels=batch).loss, wanted)


def test_configurations_are_pickled_and_copied() -> None:
    config = GPTConfig.preset("gpt1", **SIZES, pad_token=3)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):  # noqa: S301
        assert twin == config and twin is not config
    assert pickle.loads(pickle.dumps(ours().config)) == ours().config  # noqa: S301


# ---- ranks -----------------------------------------------------------------------------------------------------------

RANK = """
import sys, torch, gpt_fast, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.model.test_torch_tools import accelerated, gradients, ours, tokens

from gpt_fast.integrations.huggingface.losses import Deferred

def refuse(self):
    raise AssertionError("logits were computed, though nobody reads them")

Deferred.__call__ = refuse
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for make in (ours, accelerated, lambda: accelerated("OpenAIGPTLMHeadModel")):
    torch.manual_seed(0)
    model, batches = make(), [tokens(), tokens()]
    both = [gradients(model, batch) for batch in batches]
    wanted = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        wrapped = DistributedDataParallel(model, **options)
        got = gradients(wrapped, batches[rank])
        for name, value in wanted.items():
            torch.testing.assert_close(got["module." + name], value, rtol=1e-5, atol=1e-6, msg=name)
    mesh = init_device_mesh("cpu", (2,))
    blocks = model.trunk.decoders if hasattr(model, "trunk") else model.transformer.h
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    got = gradients(model, batches[rank])
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].to_local().numel() < value.numel() or value.shape[0] == 1, name  # really in parts
        torch.testing.assert_close(got[name].full_tensor(), value, rtol=1e-5, atol=1e-6, msg=name)
torch.manual_seed(0)
seed = gpt_fast.ops.new_seed("cpu")
seeds = [torch.empty_like(seed) for _ in range(2)]
dist.all_gather(seeds, seed)
assert seeds[0] != seeds[1]  # each rank drops out something else
dist.destroy_process_group()
print("done")
"""


def test_ddp_and_fsdp2_over_gloo(tmp_path: Path) -> None:
    """DDP and FSDP2 both give the mean of two ranks' gradients, as one process computes it."""
    two_ranks.run(RANK, tmp_path)
