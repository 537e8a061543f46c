"""A run folder in lm-evaluation-harness, against the harness's own model of transformers on the same weights."""

import json
import subprocess
import sys

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="the extra harness is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from gpt_fast import GPTConfig, GPTForCausalLM  # noqa: E402
from gpt_fast.data.tokenizer import save_tokenizer, special_ids, train_bpe, vocabulary_size  # noqa: E402
from gpt_fast.model_folder import write_config  # noqa: E402
from gpt_fast.training import evaluate  # noqa: E402
from gpt_fast.training.harness import GPTFastLM  # noqa: E402
from tests.command_line import ENVIRONMENT, SENTENCES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LAMBADA = """
task: local_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
HELLASWAG = """
task: local_hellaswag
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: ctx
doc_to_target: label
doc_to_choice: endings
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a run of random weights, and with data and a task of each of two forms."""
    path = tmp_path_factory.mktemp("harness")
    tokenizer = train_bpe([SENTENCES], 300)
    torch.manual_seed(0)
    config = GPTConfig.preset(
        "gpt2", num_tokens=vocabulary_size(tokenizer), hidden_dim=32, num_heads=4, num_layers=2, seq_len=24,
        init_std=0.3, **special_ids(tokenizer),
    )  # fmt: skip
    model = GPTForCausalLM(config)
    (path / "run").mkdir()
    model.save_pretrained(path / "run")
    write_config(model, config, path / "run")
    save_tokenizer(tokenizer, path / "run" / "tokenizer.json")
    lines = SENTENCES.splitlines()
    texts = [{"text": line} for line in lines[:30]]
    endings = ["runs times", "the blue fox", "7", "red runs runs 3 times"]
    rows = [
        {"ctx": line[:14], "endings": endings[i % 3 :] + endings[: i % 3], "label": i % 4}
        for i, line in enumerate(lines[:30])
    ]
    (path / "tasks").mkdir()
    for name, content, yaml in (("lambada", texts, LAMBADA), ("hellaswag", rows, HELLASWAG)):
        data = path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in content))
        (path / "tasks" / f"local_{name}.yaml").write_text(yaml.format(path=data))
    return path


def theirs(folder):
    """Return the harness's own model, a transformers model with the same weights and tokenizer."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "run" / "tokenizer.json"),
        bos_token="<|start|>",
        eos_token="<|start|>",
        pad_token="<|pad|>",
    )
    model = GPTForCausalLM.from_pretrained(folder / "run").to_hf().eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")


def figures(model, folder):
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["local_lambada", "local_hellaswag"], task_manager=tasks, bootstrap_iters=0, log_samples=False
    )
    return {
        (task, name): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_the_harness_finds_what_it_finds_of_transformers(folder):
    ours, expected = figures(GPTFastLM(folder / "run", "cpu"), folder), figures(theirs(folder), folder)
    assert ours == pytest.approx(expected, rel=1e-4)
    assert {name for _, name in ours} == {"acc,none", "acc_norm,none", "perplexity,none"}


def test_evaluate_finds_what_the_harness_finds(folder):
    expected = figures(theirs(folder), folder)
    words = evaluate.evaluate(folder / "run", folder / "lambada.jsonl", None, None, "cpu", form="lambada")
    assert words["last_word_accuracy"] == expected["local_lambada", "acc,none"]
    assert words["last_word_perplexity"] == pytest.approx(expected["local_lambada", "perplexity,none"], rel=1e-4)
    choices = evaluate.evaluate(folder / "run", folder / "hellaswag.jsonl", None, None, "cpu", form="hellaswag")
    assert choices["choice_accuracy"] == expected["local_hellaswag", "acc,none"]
    assert choices["choice_accuracy_norm"] == expected["local_hellaswag", "acc_norm,none"]


def test_whole_texts(folder):
    """Log-likelihoods agree for a text of several windows, a text of one window and an empty text."""
    texts = [SENTENCES[:300], "the red fox", ""]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours = GPTFastLM(folder / "run", "cpu").loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs(folder).loglikelihood_rolling(requests), rel=1e-5)
    assert ours[2] == 0


def test_texts_to_write(folder):
    options = {"until": ["fox", "\n"], "max_gen_toks": 8, "do_sample": False}
    contexts = [SENTENCES[:20], SENTENCES[:200], "7"]  # the second is longer than the model's positions
    requests = [Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(contexts)]
    ours = GPTFastLM(folder / "run", "cpu").generate_until(requests)
    assert ours == theirs(folder).generate_until(requests)
    assert any(ours)


def test_the_command(folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "gpt_fast.training.harness", "--model", "gpt-fast", "--model_args",
            f"run={folder / 'run'}", "--tasks", "local_lambada", "--include_path", folder / "tasks", "--device", "cpu",
            "--output_path", tmp_path,
        ],
        env=ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("results_*.json")
    result = evaluate.evaluate(folder / "run", folder / "lambada.jsonl", None, None, "cpu", form="lambada")
    assert json.loads(path.read_text())["results"]["local_lambada"]["acc,none"] == result["last_word_accuracy"]
