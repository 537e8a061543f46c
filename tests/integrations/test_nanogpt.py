"""Checkpoints of nanoGPT, minGPT and llm.c: conversion bit for bit, equal results, errors that name the fault."""

import ast
import json
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn

from gpt_fast import GPTConfig, GPTForCausalLM, GPTForSequenceClassification
from gpt_fast.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from gpt_fast.integrations.nanogpt.checkpoint import read
from gpt_fast_cli.app import run
from tests import handwritten, numerics
from tests.command_line import SENTENCES, Cli, Result, succeed
from tests.handwritten import LAYERS, C, H, P, V

ARGS = {
    "n_layer": LAYERS, "n_head": H, "n_embd": C, "block_size": P, "bias": True, "vocab_size": V, "dropout": 0.1,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
# The characters of the text that the command-line tests train on, and enough others for a vocabulary of V.
LETTERS = "".join(sorted(set(SENTENCES) | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?.,;:-+")))[:V]


def their_model(bias: bool = True) -> nn.Module:
    return handwritten.make("packed" if bias else "packed_without_bias").eval()


def checkpoint(theirs: nn.Module | None = None, **changes: Any) -> dict[str, Any]:
    """Return a checkpoint as nanoGPT's train.py saves it, with `changes`."""
    made = {
        "model": (theirs or their_model()).state_dict(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "model_args": dict(ARGS),
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.25),
        "config": {"dataset": "shakespeare_char", "learning_rate": 6e-4, "compile": True},
    }
    return made | changes


@pytest.fixture
def here(monkeypatch, capsys) -> Cli:
    """Return a function that runs a command line in this process, in milliseconds, as many files are refused."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` replaces it

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gpt-fast", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run()
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return call


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refuse(result: Result, *messages: str) -> None:
    """Assert that the command ended with code 2, nothing on stdout and one line of error, which has all `messages`."""
    assert result.code == 2, result
    assert result.out == "" and len(result.err.strip().splitlines()) == 1, result.err
    for message in messages:
        assert message in result.err, result.err


@torch.no_grad()
def assert_computes_the_same(ours: GPTForCausalLM, theirs: nn.Module) -> None:
    """Assert that our logits are as accurate as theirs in float32. The exact values are their model's in float64."""
    tokens = torch.randint(V, (3, P), generator=torch.Generator().manual_seed(1))
    given = theirs(tokens, tokens)[0]  # given targets, nanoGPT returns the logits of every position
    exact = theirs.double()(tokens, tokens)[0]
    theirs.float()
    numerics.assert_as_accurate(ours.eval()(tokens).logits, given, exact)


def assert_equal_tensors(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


# ---- nanoGPT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod.")], ids=["bias", "compiled_no_bias"])
def test_nanogpt_there_and_back(cli, tmp_path, bias, prefix):
    theirs = their_model(bias)
    saved = checkpoint(theirs, model_args=ARGS | {"bias": bias})
    saved["model"] = {prefix + name: tensor for name, tensor in saved["model"].items()}
    torch.save(saved, tmp_path / "ckpt.pt")
    result = succeed(cli("convert", "--from", tmp_path / "ckpt.pt", "--out", tmp_path / "run", "--json"))
    told = json.loads(result.out)
    assert (told["from"], told["dtype"], told["activation"], told["tied"]) == ("nanoGPT", "float32", "gelu", True)
    assert told["numbers"] == sum(p.numel() for p in theirs.parameters())
    assert "left out" in result.err and "optimizer" in result.err and "holds no tokenizer" in result.err
    assert names(tmp_path / "run") == ["config.json", "model.safetensors", "nanogpt.json"]

    ours = GPTForCausalLM.from_pretrained(tmp_path / "run")
    assert_computes_the_same(ours, theirs)
    rates = (ours.config.embedding_dropout, ours.config.attention_dropout, ours.config.residual_dropout)
    assert rates == (0.1, 0.1, 0.1) and ours.config.ff_dropout == 0
    assert not [name for name, _ in ours.named_parameters() if "bias" in name] or bias

    succeed(cli("convert", "--from", tmp_path / "run", "--to", "nanogpt", "--out", tmp_path / "new" / "ckpt.pt"))
    back = torch.load(tmp_path / "new" / "ckpt.pt", weights_only=True)
    assert_equal_tensors(back["model"], theirs.state_dict())
    assert back["model"]["lm_head.weight"].data_ptr() == back["model"]["transformer.wte.weight"].data_ptr()
    assert list(back["model_args"].items()) == list((ARGS | {"bias": bias}).items())
    assert (back["iter_num"], back["best_val_loss"], back["config"]) == (2000, 3.25, saved["config"])
    their_model(bias).load_state_dict(back["model"])


def test_nanogpt_resumes_with_the_optimizer(tmp_path, here):
    """Both parameter groups of nanoGPT, matrices and the rest, load the state. A step changes every parameter."""
    GPTForCausalLM.from_nanogpt(their_model().state_dict(), ARGS).save_pretrained(tmp_path / "run")
    succeed(here("convert", "--from", tmp_path / "run", "--to", "nanogpt", "--out", tmp_path / "ckpt.pt"))
    saved, model = torch.load(tmp_path / "ckpt.pt", weights_only=True), their_model()
    assert (saved["iter_num"], saved["best_val_loss"], saved["config"]) == (0, 1e9, {})
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if (p.dim() >= 2) is decays]} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    optimizer.load_state_dict(saved["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    before = [p.detach().clone() for p in parameters]
    tokens = torch.randint(V, (2, P))
    model(tokens, tokens)[1].backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_a_run_of_ours_becomes_nanogpt(here, tmp_path):
    """iter_num and best_val_loss come from run.json."""
    config = GPTConfig.preset(
        "gpt2", num_tokens=V, hidden_dim=C, num_heads=H, num_layers=LAYERS, seq_len=P, activation="gelu", bias=False
    )
    ours = GPTForCausalLM(config)
    ours.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"command": "pretrain", "steps": 40, "valid_loss": 2.5}))
    succeed(here("convert", "--from", tmp_path / "run", "--to", "nanogpt", "--out", tmp_path / "ckpt.pt"))
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert (saved["iter_num"], saved["best_val_loss"]) == (40, 2.5)
    theirs = their_model(bias=False)
    theirs.load_state_dict(saved["model"])
    assert_computes_the_same(ours, theirs)
    succeed(here("convert", "--from", tmp_path / "ckpt.pt", "--out", tmp_path / "again"))
    assert_equal_tensors(GPTForCausalLM.from_pretrained(tmp_path / "again").state_dict(), ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_keeps_its_bits(here, tmp_path, dtype):
    theirs = their_model().to(dtype)
    torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
    told = json.loads(succeed(here("convert", "--from", tmp_path / "ckpt.pt", "--out", tmp_path / "run", "--json")).out)
    assert told["dtype"] == str(dtype).removeprefix("torch.")
    state, _ = GPTForCausalLM.from_pretrained(tmp_path / "run").to_nanogpt()
    assert_equal_tensors({name: tensor.to(dtype) for name, tensor in state.items()}, theirs.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(prefix):
    state = their_model().state_dict()
    ours = GPTForCausalLM.from_nanogpt({prefix + name: tensor for name, tensor in state.items()}, ARGS)
    assert_equal_tensors(ours.to_nanogpt()[0], state)


def test_from_a_model_in_memory():
    theirs = their_model()
    ours = GPTForCausalLM.from_nanogpt(theirs.state_dict(), ARGS)
    assert ours.is_tied() and ours.training
    assert_computes_the_same(ours, theirs)
    state, args = ours.to_nanogpt()
    assert_equal_tensors(state, theirs.state_dict())
    assert args == ARGS
    with pytest.raises(ValueError, match="n_layer an integer of 16,610 bits; expected an integer from 1"):
        GPTForCausalLM.from_nanogpt(state, ARGS | {"n_layer": 10**5000})
    state["lm_head.weight"] = state["lm_head.weight"] + 1  # as in a fork that unties the output layer
    free = GPTForCausalLM.from_nanogpt(state, ARGS)
    assert not free.is_tied() and torch.equal(free.output_layer.weight, state["lm_head.weight"])


# ---- minGPT and build-nanogpt ----------------------------------------------------------------------------------------


def test_mingpts_state_dict(here, tmp_path):
    """The model has GELU's tanh form, an untied output layer, and a causal mask in every block."""
    theirs = handwritten.make("masked").eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    source = ["convert", "--from", tmp_path / "model.pt", "--out", tmp_path / "run"]
    refuse(here(*source), "nothing tells heads and activation", "--heads", "--activation gelu_tanh")
    refuse(here(*source, "--heads", 5, "--activation", "gelu_tanh"), "n_head 5", "equal width")
    refuse(here(*source, "--heads", H, "--activation", "silu"), "activation is 'silu'", "gelu_tanh")
    assert names(tmp_path) == ["model.pt"]
    told = json.loads(succeed(here(*source, "--heads", H, "--activation", "gelu_tanh", "--json")).out)
    assert told["tied"] is False
    assert_computes_the_same(GPTForCausalLM.from_pretrained(tmp_path / "run"), theirs)
    refuse(
        here("convert", "--from", tmp_path / "run", "--to", "nanogpt", "--out", tmp_path / "ckpt.pt"),
        "activation gelu_tanh (nanoGPT has the exact gelu)", "an output layer of its own",
    )  # fmt: skip


def test_sizes_without_dropout_do_not_tell_the_activation(here, tmp_path):
    """build-nanogpt's configuration has neither bias nor dropout, early nanoGPT's no bias; both have the tanh form."""
    args = {name: value for name, value in ARGS.items() if name not in ("bias", "dropout")}
    torch.save({"model": their_model().state_dict(), "model_args": args}, tmp_path / "model.pt")
    source = ["convert", "--from", tmp_path / "model.pt", "--out", tmp_path / "run"]
    refuse(here(*source), "model_args has not both bias and dropout", "--activation gelu_tanh")
    succeed(here(*source, "--activation", "gelu_tanh"))
    assert GPTForCausalLM.from_pretrained(tmp_path / "run").config.activation == "gelu_tanh"
    with pytest.raises(ValueError, match="expected activation= too"):
        GPTForCausalLM.from_nanogpt(their_model().state_dict(), args)


# ---- llm.c -----------------------------------------------------------------------------------------------------------

PADDED = 64  # rows of the vocabulary in llm.c's files, V of which are tokens
HEADER = [20240326, 3, P, V, LAYERS, H, C, PADDED]
ORDER = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def llmc_file(header: list[int], model: nn.Module | None = None) -> bytes:
    """Return a file as llm.c writes it: header, embeddings, each kind of tensor for all layers, the last norm."""
    state = (model or their_model()).state_dict()
    padding = torch.full((PADDED - V, C), torch.nan)  # the values in these rows must not matter
    tensors = [torch.cat([state["transformer.wte.weight"], padding]), state["transformer.wpe.weight"]]
    tensors += [state[f"transformer.h.{i}.{name}"] for name in ORDER for i in range(LAYERS)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    numbers = flat.bfloat16().view(torch.int16).numpy() if header[1] == 5 else flat.numpy()
    return np.array(header + [0] * (256 - len(header)), "<i4").tobytes() + numbers.tobytes()


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)], ids=["float32", "bfloat16"])
def test_llmc(here, tmp_path, version, dtype):
    theirs = their_model()
    (tmp_path / "model.bin").write_bytes(llmc_file([HEADER[0], version, *HEADER[2:]], theirs))
    told = json.loads(
        succeed(here("convert", "--from", tmp_path / "model.bin", "--out", tmp_path / "run", "--json")).out
    )
    assert (told["from"], told["dtype"], told["activation"]) == (
        "llm.c",
        str(dtype).removeprefix("torch."),
        "gelu_tanh",
    )
    ours = GPTForCausalLM.from_pretrained(tmp_path / "run")
    assert (ours.config.num_tokens, ours.config.residual_dropout) == (V, 0.0)
    theirs.to(dtype).float()
    for block in theirs.transformer["h"]:
        block.mlp.gelu = nn.GELU(approximate="tanh")
    assert_computes_the_same(ours, theirs)
    in_memory = GPTForCausalLM.from_nanogpt(theirs.state_dict(), ARGS, activation="gelu_tanh")
    assert_equal_tensors(ours.state_dict(), in_memory.state_dict())


def with_field(place: int, value: int) -> bytes:
    header = HEADER + [0] * (256 - len(HEADER))
    header[place] = value
    return llmc_file(header)


BAD_LLMC = {
    "nothing": (b"", "no checkpoint"),
    "three bytes": (llmc_file(HEADER)[:3], "no checkpoint"),
    "half a header": (llmc_file(HEADER)[:512], "cut off"),
    "header alone": (llmc_file(HEADER)[:1024], "1,024 bytes; expected"),
    "one byte short": (llmc_file(HEADER)[:-1], "bytes; expected"),
    "one byte more": (llmc_file(HEADER) + b"\0", "bytes; expected"),
    "another magic": (with_field(0, 20240325), "no checkpoint"),
    "old version": (with_field(1, 1), "version 1; expected 3 (float32) or 5 (bfloat16)"),
    "bfloat16 of another size": (with_field(1, 5)[: len(llmc_file(HEADER))] + b"\0\0", "bytes; expected"),
    "no positions": (with_field(2, 0), "max_seq_len 0; expected 1 or more"),
    "negative vocabulary": (with_field(3, -5), "vocab_size -5"),
    "no layers": (with_field(4, 0), "num_layers 0"),
    "absurd layers": (with_field(4, 2**31 - 1), "bytes; expected"),
    "no heads": (with_field(5, 0), "num_heads 0"),
    "heads of unequal width": (with_field(5, 5), "num_heads 5 and channels 32"),
    "absurd width": (with_field(6, 2**31 - 4), "num_heads 4 and channels 2147483644"),
    "wider than the file": (with_field(6, 1024), "bytes; expected"),
    "less than the vocabulary": (with_field(7, V - 1), f"padded_vocab_size {V - 1}; expected vocab_size {V} or more"),
    "unknown field": (with_field(8, 1), "a number behind padded_vocab_size"),
    "optimizer state": (with_field(0, 20240527), "an optimizer state; the model_*.bin beside it holds the weights"),
    "token file": (with_field(0, 20240520), "a token file; pretrain --data reads it"),
    "tokenizer": (with_field(0, 20240328), "a tokenizer, by llm.c"),
    "debug state": (with_field(0, 20240327), "a debug state"),
    "evaluation data": (with_field(0, 20240522), "a data set for evaluation"),
    "llama": (with_field(0, 20240803), "a Llama 3 model"),
}


@pytest.mark.parametrize("case", BAD_LLMC)
def test_llmc_refuses(here, tmp_path, case):
    content, message = BAD_LLMC[case]
    (tmp_path / "model.bin").write_bytes(content)
    refuse(here("convert", "--from", tmp_path / "model.bin", "--out", tmp_path / "new" / "run"), "model.bin: ", message)
    assert names(tmp_path) == ["model.bin"]


# ---- damaged and hostile checkpoints ---------------------------------------------------------------------------------


class Hostile:
    """Object whose unpickling runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@dataclass
class ModelConfig:
    """Configuration as build-nanogpt pickles it."""

    block_size: int = P


def rewritten(path: Path, pickled: Any = lambda data: data, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with another pickle or compressed, so that all checksums are right."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, pickled(data) if name.endswith("data.pkl") else data)


def test_a_pickle_that_runs_code_is_refused(here, tmp_path):
    """Code runs neither from a pickle in a checkpoint nor from a bare pickle."""
    torch.save(checkpoint(config=Hostile(tmp_path / "ran")), tmp_path / "ckpt.pt")
    source = ["convert", "--out", tmp_path / "run", "--from"]
    refuse(here(*source, tmp_path / "ckpt.pt"), "ckpt.pt: holds posix.system", "torch.load(weights_only=True)")
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    refuse(here(*source, tmp_path / "ckpt.pt"), "no checkpoint (a pickle without torch.save's archive is not read)")
    assert names(tmp_path) == ["ckpt.pt"]


def test_a_pickled_configuration_is_refused_with_the_way_out(here, tmp_path):
    """A file made as the message proposes converts."""
    path = tmp_path / "model.pt"
    args = {name: value for name, value in ARGS.items() if name not in ("bias", "dropout")}
    torch.save({"model": their_model().state_dict(), "config": ModelConfig(), "step": 3}, path)
    result = here("convert", "--from", path, "--out", tmp_path / "run")
    refuse(result, "ModelConfig, which torch.load(weights_only=True) does not unpickle", "vars(checkpoint['config'])")
    torch.save({"model": their_model().state_dict(), "model_args": args}, path)
    succeed(here("convert", "--from", path, "--out", tmp_path / "run", "--activation", "gelu"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_weight(path: Path) -> None:
    """Change one bit in the middle of the file, which lies in the tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def promise_more(path: Path) -> None:
    """Let the pickle give storages more numbers than their records hold."""
    old, new = (b"K\x20", b"J" + struct.pack("<i", 2**31 - 1))
    assert C == 32
    rewritten(path, lambda data: data.replace(old, new))


def old_format(path: Path) -> None:
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=False)


DAMAGES = {
    "cut off": (cut, "damaged or cut off"),
    "a bit flipped": (flip_a_weight, "damaged, the checksum of"),
    "compressed": (lambda path: rewritten(path, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a storage larger than its record": (promise_more, "damaged or no checkpoint"),
    "a pickle that breaks off": (lambda path: rewritten(path, lambda data: data[:50]), "damaged or no checkpoint"),
    "a pickle of noise": (
        lambda path: rewritten(path, lambda data: b"\x80\x02" + bytes(99)),
        "damaged or no checkpoint",
    ),
    "another archive": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "text"), "damaged or"),
    "the format before PyTorch 1.6": (old_format, "a pickle without torch.save's archive"),
    "text": (lambda path: path.write_text("weights"), "no checkpoint"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(here, tmp_path, case):
    damage, message = DAMAGES[case]
    torch.save(checkpoint(), tmp_path / "ckpt.pt")
    damage(tmp_path / "ckpt.pt")
    refuse(here("convert", "--from", tmp_path / "ckpt.pt", "--out", tmp_path / "new" / "run"), "ckpt.pt: ", message)
    assert names(tmp_path) == ["ckpt.pt"]


def test_no_damage_changes_weights(tmp_path):
    """Each damaged file is refused, or has the same weights because only a date or the like was changed.

    Bytes are cut off or changed, most of them where the archive keeps its sizes and offsets.
    """
    path, rng, refused = tmp_path / "ckpt.pt", random.Random(0), 0
    saved = checkpoint()
    torch.save(saved, path)
    whole = path.read_bytes()
    for _ in range(300):
        content = bytearray(whole)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        else:
            place = rng.choice(
                (rng.randrange(4000), rng.randrange(len(content) - 8000, len(content)), rng.randrange(len(content)))
            )
            content[place] = rng.randrange(256)
        path.write_bytes(content)
        try:
            loaded = read(path)
            model = GPTForCausalLM.from_nanogpt(loaded.state_dict, loaded.model_args)
        except ValueError:
            refused += 1
            continue
        assert_equal_tensors(model.to_nanogpt()[0], saved["model"])
    assert refused > 100


def test_no_damaged_pickle_is_more_than_an_error(tmp_path):
    """A damaged pickle in an intact archive with right checksums raises no error but `ValueError`."""
    path, rng, refused = tmp_path / "ckpt.pt", random.Random(0), 0
    for _ in range(200):
        torch.save(checkpoint(), path)
        rewritten(path, lambda data: damaged(data, rng))
        try:
            loaded = read(path)
            GPTForCausalLM.from_nanogpt(loaded.state_dict, loaded.model_args)
        except ValueError:
            refused += 1
    assert refused > 100


def damaged(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data)
    content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def state(**changes: Any) -> dict[str, Any]:
    """Return the checkpoint with the given tensors replaced, or removed if None. `__` in a name stands for a dot."""
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    made = their_model().state_dict() | changed
    return checkpoint(model={name: tensor for name, tensor in made.items() if tensor is not None})


def sizes(**changes: Any) -> dict[str, Any]:
    return checkpoint(model_args=ARGS | changes)


BLOCK = "transformer__h__1__"
BAD_CONTENT: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "holds a list"),
    "nothing": ({}, "has no key 'model'"),
    "settings alone": ({"config": {}}, "has no key 'model'"),
    "model is a list": (checkpoint(model=[1]), "state_dict is of type list"),
    "model is None": (checkpoint(model=None), "state_dict is None"),
    "a number for a tensor": (state(lm_head__weight=3.0), "lm_head.weight of type float; expected a dense tensor"),
    "a name that is none": (checkpoint(model={3: torch.ones(1)}), "the key 3"),
    "integers": (state(transformer__ln_f__bias=torch.ones(C, dtype=torch.int64)), "ln_f.bias has torch.int64"),
    "float64": (state(transformer__ln_f__bias=torch.ones(C, dtype=torch.float64)), "ln_f.bias has torch.float64"),
    "two dtypes": (state(transformer__ln_f__bias=torch.ones(C).half()), "ln_f.bias has torch.float16"),
    "sparse": (
        state(transformer__wte__weight=torch.eye(V, C).to_sparse()),
        "wte.weight of type Tensor; expected a dense",
    ),
    "no values": (
        state(transformer__ln_f__bias=torch.ones(C, device="meta")),
        "ln_f.bias of type Tensor; expected a dense",
    ),
    "one number as very many": (
        state(transformer__wte__weight=torch.ones(1).expand(10**9, 10**9)),
        "wte.weight has shape [1000000000, 1000000000]; expected as many numbers in its storage",
    ),
    "a tensor missing": (state(**{BLOCK + "mlp__c_fc__bias": None}), "lacks transformer.h.1.mlp.c_fc.bias"),
    "a tensor too many": (
        state(**{BLOCK + "attn__rotary": torch.ones(4)}),
        "has transformer.h.1.attn.rotary; expected no",
    ),
    "another shape": (
        state(**{BLOCK + "attn__c_attn__weight": torch.ones(C, 3 * C)}),
        "c_attn.weight has shape [32, 96]; expected [96, 32]",
    ),
    "a block too many": (state(transformer__h__3__ln_1__weight=torch.ones(C)), "has 4 blocks"),
    "a block's number in another script": (
        state(**{"transformer__h__٣__ln_1__weight": torch.ones(C)}),
        "has 4 blocks",
    ),
    "a name twice": (state(_orig_mod__lm_head__weight=torch.ones(V, C)), "has lm_head.weight twice"),
    "a mask that is not causal": (state(**{BLOCK + "attn__bias": torch.ones(1, 1, P, P)}), "no causal mask"),
    "a mask of another shape": (state(**{BLOCK + "attn__bias": torch.ones(3, P)}), "no causal mask"),
    "biases in a model without": (checkpoint(model_args=ARGS | {"bias": False}), "because model_args has bias False"),
    "no sizes": (checkpoint(model_args={}), "model_args has not both bias and dropout"),
    "sizes that are a list": (checkpoint(model_args=[1]), "model_args is of type list"),
    "an option of a fork": (sizes(rotary=True), "model_args has rotary; expected only"),
    "a size missing": (
        checkpoint(model_args={name: value for name, value in ARGS.items() if name != "n_head"}),
        "lacks n_head",
    ),
    "absurd layers": (sizes(n_layer=10**18), "n_layer 1000000000000000000; expected an integer from 1"),
    "many layers": (sizes(n_layer=2**28), "has 3 blocks transformer.h.N; expected n_layer = 268435456"),
    "absurd width": (sizes(n_embd=10**18), "n_embd 1000000000000000000"),
    "another width": (sizes(n_embd=2**20, n_head=2**14), "wte.weight has shape [61, 32]; expected [61, 1048576]"),
    "a text for a size": (sizes(n_embd="32"), "n_embd '32'"),
    "a bool for a size": (sizes(n_layer=True), "n_layer True"),
    "a float for a size": (sizes(n_layer=3.0), "n_layer 3.0"),
    "no width": (sizes(n_embd=0), "n_embd 0"),
    "heads of unequal width": (sizes(n_head=5), "n_head 5 and n_embd 32"),
    "vocabulary": (sizes(vocab_size=V + 1), "wte.weight has shape [61, 32]; expected [62, 32]"),
    "positions": (sizes(block_size=P + 1), "wpe.weight has shape [24, 32]; expected [25, 32]"),
    "dropout above 1": (sizes(dropout=2), "dropout 2; expected a probability"),
    "dropout that is no number": (sizes(dropout=float("nan")), "dropout nan"),
    "bias that is a number": (sizes(bias=1), "bias 1; expected True or False"),
    "a step that is none": (checkpoint(iter_num="many"), "iter_num is a str"),
    "a step below 0": (checkpoint(iter_num=-1), "iter_num"),
    "a loss that is none": (checkpoint(best_val_loss=torch.ones(2)), "best_val_loss is a Tensor"),
    "settings that are none": (checkpoint(config=[1]), "config is a list"),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_wrong_content_is_refused(here, tmp_path, case):
    content, message = BAD_CONTENT[case]
    torch.save(content, tmp_path / "ckpt.pt")
    refuse(here("convert", "--from", tmp_path / "ckpt.pt", "--out", tmp_path / "new" / "run"), "ckpt.pt: ", message)
    assert names(tmp_path) == ["ckpt.pt"]


def test_a_full_disk_leaves_nothing(cli, tmp_path):
    GPTForCausalLM.from_nanogpt(their_model().state_dict(), ARGS).save_pretrained(tmp_path / "run")
    before = names(tmp_path)
    command = ["convert", "--from", tmp_path / "run", "--to", "nanogpt", "--out", tmp_path / "new" / "ckpt.pt"]
    refuse(cli(*command, file_size=20_000), "ckpt.pt: cannot be written")
    assert names(tmp_path) == before


def test_one_module_alone_unpickles():
    """The package calls torch.load in one place, with weights_only=True, and imports nothing else that unpickles."""
    found = []
    for path in (
        path for room in ("gpt_fast", "gpt_fast_cli", "gpt_fast_settings") for path in (ROOT / room).rglob("*.py")
    ):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & set(imported), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "load",
                "torch.serialization.load",
            ):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if ast.unparse(node.func) == "load" and "weights_only" not in options:
                    continue
                found.append((path.relative_to(ROOT).as_posix(), options.get("weights_only")))
    assert found == [("gpt_fast/integrations/nanogpt/checkpoint.py", "True")]


# ---- to nanoGPT ------------------------------------------------------------------------------------------------------

CONFIG = {"num_tokens": V, "hidden_dim": C, "num_heads": H, "num_layers": 1, "seq_len": P, "activation": "gelu"}
UNHELD = {
    "relu": ({"activation": "relu"}, "activation relu (nanoGPT has the exact gelu)"),
    "gelu_tanh": ({"activation": "gelu_tanh"}, "activation gelu_tanh"),
    "post-norm": ({"pre_norm": False}, "post-norm blocks"),
    "free output layer": ({"tied": False}, "an output layer of its own"),
    "output bias": ({"output_bias": True}, "an output bias"),
    "ff_dim": ({"ff_dim": 48}, "ff_dim 48 (nanoGPT has 4 n_embd)"),
    "eps": ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
    "hidden dropout": ({"ff_dropout": 0.2}, "dropout 0.2 on the hidden activation"),
    "different dropouts": ({"attention_dropout": 0.0}, "dropouts (0.1, 0.0, 0.1)"),
}


@pytest.mark.parametrize("case", UNHELD)
def test_nanogpt_cannot_hold(here, tmp_path, case):
    changes, message = UNHELD[case]
    model = GPTForCausalLM(GPTConfig(**(CONFIG | changes)))
    with pytest.raises(ValueError, match="gpt_fast.to_nanogpt: nanoGPT cannot hold"):
        model.to_nanogpt()
    model.save_pretrained(tmp_path / "run")
    command = ["convert", "--from", tmp_path / "run", "--to", "nanogpt", "--out", tmp_path / "new" / "ckpt.pt"]
    refuse(here(*command), "run: nanoGPT cannot hold", message)
    assert names(tmp_path) == ["run", "run/config.json", "run/model.safetensors"]


def test_a_changed_model_is_refused():
    model = GPTForCausalLM(GPTConfig(**CONFIG))
    model.trunk.decoders[0].layer_norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="trunk.decoders.0.layer_norm1 has hooks"):
        model.to_nanogpt()


def test_options_that_do_not_fit(here, tmp_path):
    GPTForSequenceClassification(GPTConfig(**CONFIG)).save_pretrained(tmp_path / "classifier")
    GPTForCausalLM(GPTConfig(**CONFIG)).save_pretrained(tmp_path / "lm")
    (tmp_path / "out").mkdir()
    torch.save(checkpoint(), tmp_path / "out" / "ckpt.pt")
    (tmp_path / "model.bin").write_bytes(llmc_file(HEADER))
    (tmp_path / "letters.txt").write_text(LETTERS, encoding="utf-8")
    before = names(tmp_path)
    for source, options, message in (
        ("classifier", "--to nanogpt", "holds a GPTForSequenceClassification; expected a GPTForCausalLM"),
        ("lm", "--to keras", "--to keras: expected one of gpt-fast, transformers, nanogpt"),
        ("lm", "--to gpt-fast", "is a folder of gpt-fast already"),
        ("lm", "--to nanogpt --head clm", "--head clm: is for a folder of transformers"),
        ("lm", "--heads 4", "--heads 4: {tmp}/lm is no checkpoint"),
        ("lm", "--tokenizer {tmp}/letters.txt", "is no checkpoint of nanoGPT or llm.c"),
        ("out", "", "nanoGPT's folder; expected its checkpoint, --from {tmp}/out/ckpt.pt"),
        ("out/ckpt.pt", "--to transformers", "becomes a run folder first"),
        ("out/ckpt.pt", "--to nanogpt", "becomes a run folder first"),
        ("out/ckpt.pt", "--head classifier", "gpt-fast finetune puts another head on it"),
        ("out/ckpt.pt", "--heads 4", "has model_args, which tell the heads"),
        ("out/ckpt.pt", "--out {tmp}/lm", "exists already"),
        ("model.bin", "--activation gelu", "is a file of llm.c, which tells"),
        ("out/ckpt.pt", "--tokenizer {tmp}/letters.txt", "not a tokenizer.json"),
        ("out/ckpt.pt", "--tokenizer {tmp}/letters.txt --characters {tmp}/letters.txt", "expected one of them"),
        ("out/ckpt.pt", "--characters {tmp}/model.bin", "not UTF-8"),
        ("out/ckpt.pt", "--characters {tmp}/none.txt", "none.txt"),
        ("none.pt", "", "none.pt"),
    ):
        given = [option.format(tmp=tmp_path) for option in options.split()]
        out = [] if "--out" in given else ["--out", tmp_path / "new" / "run"]
        refuse(here("convert", "--from", tmp_path / source, *out, *given), message.format(tmp=tmp_path))
        assert names(tmp_path) == before, options


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_character_level_model_is_used_and_fine_tuned(cli, data, tmp_path):
    """The vocabulary is the sorted characters of the text. Other characters have no embedding and are refused."""
    torch.save(checkpoint(), tmp_path / "ckpt.pt")
    (tmp_path / "input.txt").write_text(LETTERS * 2, encoding="utf-8")
    (tmp_path / "other.txt").write_text("caf\u00e9 " * 20, encoding="utf-8")
    run = tmp_path / "run"
    source = ["convert", "--from", tmp_path / "ckpt.pt", "--out", run]
    refuse(cli(*source, "--characters", tmp_path / "other.txt"), "has 5 different characters; expected 61")
    assert not run.exists()
    told = succeed(cli(*source, "--characters", tmp_path / "input.txt"))
    assert "holds no tokenizer" not in told.err
    tokenizer = load_tokenizer(run)
    assert tokenizer.encode("the fox").ids == [LETTERS.index(letter) for letter in "the fox"]

    written = json.loads(
        succeed(cli("generate", "--from", run, "--prompt", "the ", "--max-new-tokens", 9, "--seed", 0, "--json")).out
    )
    assert written["new_tokens"] == 9 and set(written["text"]) <= set(LETTERS)
    refuse(cli("generate", "--from", run, "--prompt", ""), "has no start token to begin a text with")
    refuse(cli("generate", "--from", run, "--prompt", "caf\u00e9"), "has a character without a token")
    evaluate = ["evaluate", "--from", run, "--device", "cpu", "--json", "--data"]
    assert json.loads(succeed(cli(*evaluate, data.text)).out)["loss"] > 0
    refuse(cli(*evaluate, tmp_path / "other.txt"), "has a character without a token")

    tuned = tmp_path / "tuned"
    succeed(cli("finetune", "--from", run, "--train", data.table, "--out", tuned, "--lr", 0))
    classifier = GPTForSequenceClassification.from_pretrained(tuned)
    assert classifier.config.num_tokens == V + 6  # <|unk|> and five special tokens
    ours = GPTForCausalLM.from_pretrained(run)
    assert torch.equal(classifier.trunk.token_emb.weight[:V], ours.trunk.token_emb.weight)
    succeed(cli("predict", "--from", tuned, "--text", "caf\u00e9"))
    pretrain = ["pretrain", "--from", run, "--data", data.text, "--steps", 1, "--batch-size", 4]
    succeed(cli(*pretrain, "--objective", "mlm", "--out", tmp_path / "mlm"))


def test_evaluation_of_a_converted_model_is_theirs(cli, data, tmp_path):
    """The loss that evaluate reports is the loss of the source model on the same windows."""
    theirs = their_model()
    torch.save(checkpoint(theirs), tmp_path / "ckpt.pt")
    (tmp_path / "input.txt").write_text(LETTERS, encoding="utf-8")
    run = tmp_path / "run"
    succeed(cli("convert", "--from", tmp_path / "ckpt.pt", "--out", run, "--characters", tmp_path / "input.txt"))
    measured = json.loads(succeed(cli("evaluate", "--from", run, "--data", data.text, "--device", "cpu", "--json")).out)
    ids = torch.tensor([LETTERS.index(letter) for letter in SENTENCES])
    windows = ids[: len(ids) // P * P].view(-1, P)
    assert measured["tokens"] == windows.numel()
    with torch.no_grad():
        exact = theirs.double()(windows[:, :-1], windows[:, 1:].contiguous())[1]
    numerics.assert_rounded_once(torch.tensor(measured["loss"], dtype=torch.float32), exact)


def test_a_tokenizer_of_another_vocabulary_is_refused(cli, data, tmp_path):
    """A tokenizer may have fewer tokens than the model, as GPT-2's has for nanoGPT's 50,304 rows, but not more.

    <|endoftext|> becomes the start token.
    """
    torch.save(checkpoint(), tmp_path / "ckpt.pt")
    save_tokenizer(train_bpe([SENTENCES], 270), tmp_path / "tokenizer.json")
    run = tmp_path / "run"
    refused = cli("convert", "--from", tmp_path / "ckpt.pt", "--out", run, "--tokenizer", tmp_path / "tokenizer.json")
    refuse(refused, "tokens; expected at most 61, the model's vocabulary")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    letters = {letter: i for i, letter in enumerate(sorted(set(SENTENCES)))}
    content["model"] = {"type": "WordLevel", "vocab": letters | {"<|endoftext|>": len(letters)}, "unk_token": "e"}
    content["added_tokens"] = []
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[\\s\\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    content["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    succeed(cli("convert", "--from", tmp_path / "ckpt.pt", "--out", run, "--tokenizer", tmp_path / "tokenizer.json"))
    assert GPTForCausalLM.from_pretrained(run).config.start_token == len(letters)
    succeed(cli("generate", "--from", run, "--prompt", "", "--max-new-tokens", 4, "--seed", 0))


def test_a_folder_without_a_tokenizer_is_named(cli, data, tmp_path):
    torch.save(checkpoint(), tmp_path / "ckpt.pt")
    run = tmp_path / "run"
    told = succeed(cli("convert", "--from", tmp_path / "ckpt.pt", "--out", run))
    assert str(run / "tokenizer.json") in told.err and "--characters" in told.err
    for command in (
        ["generate", "--from", run, "--prompt", "a"],
        ["evaluate", "--from", run, "--data", data.text],
        ["finetune", "--from", run, "--train", data.table, "--out", tmp_path / "tuned"],
        ["pretrain", "--from", run, "--data", data.text, "--out", tmp_path / "trained"],
    ):
        refuse(
            cli(*command), "run: has a model and no tokenizer.json; put the one there that the model was trained with"
        )
