"""Folders of transformers as people have them: pickled weights, names of labels, tokenizers, classifiers, hub names."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch

from gpt_fast import GPTConfig, GPTForCausalLM, GPTForSequenceClassification, GPTForTokenClassification, _hub
from gpt_fast.data import tokenizer as tok
from gpt_fast.integrations.huggingface.folder import EXTRAS, convert_folder
from tests import hf_models
from tests.command_line import ENVIRONMENT, succeed

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 1, "seq_len": 20}


def written(path: Path) -> dict:
    return json.loads(path.read_text())


# --- pytorch_model.bin ---


def pickled(model, folder: Path, shards: int = 1) -> Path:
    """Save `model` as an older transformers did, in one pickle or in several with an index, and return the folder."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return folder
    index = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        torch.save(dict(state[shard::shards]), folder / file)
        index |= dict.fromkeys(dict(state[shard::shards]), file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "GPT2ForSequenceClassification"])
def test_pickled_weights_are_read(tmp_path, name, shards):
    theirs = hf_models.make(name).eval()
    result = convert_folder(pickled(theirs, tmp_path / "theirs", shards), tmp_path / "ours")
    convert_folder(tmp_path / "ours", tmp_path / "back")
    back = getattr(transformers, name).from_pretrained(tmp_path / "back")
    assert result["from"] == name
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label


def test_pickled_half_precision_stays_what_it_is(tmp_path):
    theirs = hf_models.make("GPT2LMHeadModel").bfloat16()
    ours = GPTForCausalLM.from_hf(pickled(theirs, tmp_path / "theirs"))
    assert ours.trunk.pos_emb.dtype == torch.bfloat16
    assert torch.equal(ours.output_layer.weight, theirs.lm_head.weight)


class Command:
    """Object whose unpickling runs a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"x": Command()}, "holds posix.system, which torch.load(weights_only=True) does not"),
        (lambda state: state | {"x": 3}, "x is a int; expected a tensor"),
        (lambda state: [3], "holds a list; expected a state dict"),
        (lambda state: {k: v for k, v in state.items() if "ln_f.bias" not in k}, "lacks transformer.ln_f.bias;"),
        (
            lambda state: state | {"transformer.ln_f.bias": torch.ones(3)},
            "has another shape of transformer.ln_f.bias;",
        ),
        (lambda state: state | {"transformer.h.7.ln_1.bias": torch.ones(32)}, "has transformer.h.7.ln_1.bias;"),
    ],
    ids=["code", "no tensor", "a list", "missing", "shape", "spare"],
)
def test_pickled_weights_that_are_refused(tmp_path, monkeypatch, spoil, message):
    """The error names the fault. No code in the pickle runs, and no tensor is filled at random."""
    monkeypatch.chdir(tmp_path)
    theirs = hf_models.make("GPT2LMHeadModel")
    folder = pickled(theirs, tmp_path / "theirs")
    torch.save(spoil(theirs.state_dict()), folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as raised:
        convert_folder(folder, tmp_path / "ours")
    assert message in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_folder_without_weights_and_an_index_that_leads_elsewhere(tmp_path):
    folder = pickled(hf_models.make("GPT2LMHeadModel"), tmp_path / "theirs", shards=2)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../other.bin"}}))
    with pytest.raises(ValueError, match="expected a weight_map from tensors to files of this folder"):
        GPTForCausalLM.from_hf(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        GPTForCausalLM.from_hf(folder)


# --- label names, tokenizers, generation settings ---


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "OpenAIGPTForSequenceClassification"])
def test_names_of_labels_and_the_end_token_survive(tmp_path, name):
    """Label names and the end token survive conversion in memory and through folders, both ways."""
    names = {"id2label": {0: "bad", 1: "so so", 2: "good"}, "label2id": {"bad": 0, "so so": 1, "good": 2}}
    theirs = hf_models.make(name, eos_token_id=9, **names)
    ours = GPTForSequenceClassification.from_hf(theirs)
    assert (ours.config.label_names, ours.config.end_token) == (("bad", "so so", "good"), 9)
    theirs.save_pretrained(tmp_path / "theirs")
    convert_folder(tmp_path / "theirs", tmp_path / "ours")
    convert_folder(tmp_path / "ours", tmp_path / "back")
    for back in (ours.to_hf().config, transformers.AutoConfig.from_pretrained(tmp_path / "back")):
        assert (back.id2label, back.label2id, back.eos_token_id) == (names["id2label"], names["label2id"], 9)
    assert GPTForSequenceClassification.from_hf(theirs, num_labels=3).config.label_names == ("bad", "so so", "good")
    other = GPTForTokenClassification.from_hf(theirs, num_labels=5)
    assert other.config.label_names == ()


def test_names_that_transformers_makes_up_are_none():
    assert (
        GPTForSequenceClassification.from_hf(hf_models.make("GPT2ForSequenceClassification")).config.label_names == ()
    )


def test_label_names_belong_to_their_number():
    config = GPTConfig(**SIZES, num_labels=2, label_names=["a", "b"])
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(num_labels=3).label_names == ()
    with pytest.raises(ValueError, match="label_names has 1 names; expected 2, or none"):
        config.replace(label_names=("a",))
    with pytest.raises(ValueError, match="end_token is 61; expected None or an id below 61"):
        config.replace(end_token=61)


def byte_level(special: str) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer as GPT-2's, without merges and with `special` as token 256."""
    letters = tok.byte_tokenizer().get_vocab(with_added_tokens=False)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={x: i for x, i in letters.items() if i < 256}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([special])
    return made


def test_a_tokenizer_and_generation_settings_survive_both_ways(tmp_path):
    """Conversion keeps the tokenizer's configuration, and adds no <|start|> beside GPT-2's own token."""
    theirs = hf_models.make("GPT2LMHeadModel", vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=None)
    theirs.generation_config.temperature = 0.25
    theirs.generation_config.do_sample = True
    theirs.save_pretrained(tmp_path / "theirs")
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level("<|endoftext|>"), model_max_length=20, padding_side="left", **ends,
        chat_template="{{ messages[0].content }}",
    )  # fmt: skip
    fast.save_pretrained(tmp_path / "theirs")
    convert_folder(tmp_path / "theirs", tmp_path / "ours")
    assert GPTForCausalLM.from_pretrained(tmp_path / "ours").config.end_token == 256
    convert_folder(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        assert written(tmp_path / "back" / name) == written(tmp_path / "theirs" / name), name
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (back.padding_side, back.eos_token_id, len(back)) == ("left", 256, 257)
    assert back.chat_template == fast.chat_template
    shutil.rmtree(tmp_path / "ours" / EXTRAS)  # now tokenizer.json and config.json alone define the tokenizer
    convert_folder(tmp_path / "ours", tmp_path / "new")
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (new.bos_token_id, new.eos_token_id, len(new)) == (256, 256, 257)


# --- classifiers ---


@pytest.fixture(scope="module")
def tuned(cli, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    options = ["--train", data.table, "--valid", data.table, "--epochs", 2, "--convertible"]
    succeed(cli("finetune", "--from", data.lm, *options, "--out", out))
    return out


def predictions(cli, folder: Path, table: Path) -> list[dict]:
    result = json.loads(succeed(cli("predict", "--from", folder, "--data", table, "--json")).out)
    return result["predictions"]


def test_a_fine_tuned_classifier_goes_to_transformers(cli, data, tuned, tmp_path):
    """The converted tokenizer adds the special tokens of training, so both libraries give the same probabilities."""
    result = cli("convert", "--from", tuned, "--out", tmp_path / "theirs", "--json")
    assert "left out of" in succeed(result).err and "the joint loss (lm_weight 0.5)" in result.err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert model.config.id2label == {0: "cold", 1: "warm"}
    texts = ["the red fox", "a blue, blue fox", "x"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = predictions(cli, tuned, tmp_path / "t.jsonl")
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    for found, row in zip(ours, theirs.tolist(), strict=True):
        assert found["probabilities"] == pytest.approx({"cold": row[0], "warm": row[1]}, rel=1e-4)


def test_a_classifier_of_transformers_predicts_here(cli, tuned, tmp_path):
    """The classifier reads text as its own tokenizer encodes it, and predicts its own label names."""
    convert_folder(tuned, tmp_path / "theirs")
    convert_folder(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "t.csv").write_text(f"text,label\nthe red fox,warm\n{'a very long text ' * 9},cold\n")
    here, there = (predictions(cli, folder, tmp_path / "t.csv") for folder in (tuned, tmp_path / "ours"))
    for one, other in zip(here, there, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], rel=1e-4)
    result = succeed(cli("evaluate", "--from", tmp_path / "ours", "--data", tmp_path / "t.csv", "--json"))
    assert json.loads(result.out)["examples"] == 2


def test_a_classifier_that_cannot_go_names_the_option(cli, data, tmp_path):
    result = cli("convert", "--from", data.classifier, "--out", tmp_path / "theirs")
    assert result.code == 2 and "a classifier with bias" in result.err and "--convertible" in result.err
    assert not (tmp_path / "theirs").exists()
    options = ["--train", data.table, "--task", "multiple-choice", "--convertible", "--out", tmp_path / "run"]
    result = cli("finetune", "--from", data.lm, *options)
    assert result.code == 2 and "--convertible: is for transformers' classifiers" in result.err


# --- names on the hub ---


@pytest.mark.parametrize("name", ["./none/here", "/none/here", "a/b/c", Path("none")])
def test_a_path_that_is_no_folder(name):
    with pytest.raises(FileNotFoundError, match="is no folder; expected one, or a name on the hub"):
        GPTForCausalLM.from_hf(name)


def test_a_folder_needs_no_network(tmp_path, monkeypatch):
    hf_models.make("GPT2LMHeadModel").save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(_hub, "is_reachable", lambda: pytest.fail("asked for a network"))
    assert GPTForCausalLM.from_hf(tmp_path / "theirs").config.num_tokens == 61
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        GPTForCausalLM.from_hf(str(tmp_path / "theirs"))


def test_a_name_on_the_hub_without_a_network(tmp_path):
    """A name that the cache lacks gives one clear error at once. A name in the cache is loaded.

    The hub's address here refuses connections. Without the check, transformers retried for 23 seconds.
    """
    cache = tmp_path / "hub" / "models--me--tiny"
    theirs = hf_models.make("GPT2LMHeadModel")
    theirs.save_pretrained(cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    script = (
        "import time\n"
        "import transformers\n"
        "from gpt_fast import GPTForCausalLM\n"
        "GPTForCausalLM.from_hf('me/tiny')\n"
        "began = time.perf_counter()\n"
        "try:\n"
        "    GPTForCausalLM.from_hf('gpt2')\n"
        "except OSError as error:\n"
        "    print(time.perf_counter() - began, error)\n"
    )
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, _, message = done.stdout.strip().splitlines()[-1].partition(" ")
    assert float(seconds) < 2  # about 0.1 s on a quiet machine, more on a busy one
    assert message.startswith(
        "gpt_fast.from_hf: gpt2 is neither a folder nor in the cache of transformers, and 127.0.0.1"
    )


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    """Resolving the host name may block for a minute. A thread does it, and `is_reachable` waits `PATIENCE` at most."""

    def block(*_: object, **__: object) -> None:
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(_hub.socket, "create_connection", block)
    began = time.perf_counter()
    assert not _hub.is_reachable()
    assert time.perf_counter() - began < 2
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("https_proxy", "proxy:3128")
    monkeypatch.setenv("no_proxy", "")
    assert _hub.address() == ("proxy", 3128)
