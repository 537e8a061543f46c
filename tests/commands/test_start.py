"""How `gpt-fast` starts: at once, without torch; shells complete it; Ctrl-C ends it quietly."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.command_line import ENVIRONMENT

MAIN = "import sys\nsys.argv = ['gpt-fast', *sys.argv[1:]]\nfrom gpt_fast_cli.__main__ import main\n"
# Prints how much CPU the process has used and which heavy packages it has imported, after the command line's output.
REPORT = """
import json, resource
try:
    main()
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\n" + json.dumps([used.ru_utime + used.ru_stime, sorted({"torch", "numpy", "gpt_fast"} & set(sys.modules))]))
"""
COMPLETE = {"_GPT_FAST_COMPLETE": "complete_bash"}
CPU_SECONDS = 0.5


def start(script: str, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *args], env=ENVIRONMENT | extra, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    ("args", "extra", "shown"),
    [
        (["--help"], {}, "pretrain"),
        (["--version"], {}, "gpt-fast 0."),
        (["pretrain", "--help"], {}, "--batch-size"),
        ([], COMPLETE | {"COMP_WORDS": "gpt-fast pre", "COMP_CWORD": "1"}, "pretrain"),
        ([], COMPLETE | {"COMP_WORDS": "gpt-fast pretrain --ch", "COMP_CWORD": "2"}, "--checkpoint-every"),
    ],
    ids=["help", "version", "help of a command", "complete a command", "complete an option"],
)
def test_answers_at_once(args, extra, shown):
    """Neither torch nor numpy is imported, and the fastest of three starts is within the bound."""
    seconds = []
    for _ in range(3):
        printed = start(MAIN + REPORT, *args, **extra).stdout
        *output, report = printed.splitlines()
        used, imported = json.loads(report)
        assert imported == []
        assert any(shown in line for line in output)
        seconds.append(used)
    assert min(seconds) < CPU_SECONDS


# Runs one command line after the other and prints for each whether matplotlib is imported afterwards.
COMMANDS = """
import json
with open(sys.argv[1]) as file:
    commands = json.load(file)
drawing = {}
for args in commands:
    sys.argv = ["gpt-fast", *args]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, args
    drawing[args[0]] = "matplotlib" in sys.modules
print("\\n" + json.dumps(drawing))
"""


def test_only_commands_that_draw_import_matplotlib(data, tmp_path):
    """Without a home directory matplotlib prints a notice about its cache as soon as it is imported.

    `evaluate` measures a language model here: torchmetrics, which measures classifiers, imports matplotlib itself.
    """
    commands = [
        ["doctor"],
        ["prepare", "--data", data.text, "--tokenizer", data.lm / "tokenizer.json", "--out", tmp_path / "prepared"],
        ["generate", "--from", data.lm, "--prompt", "the", "--max-new-tokens", "2"],
        ["evaluate", "--from", data.lm, "--data", data.text],
        ["predict", "--from", data.classifier, "--text", "the red fox"],
        ["plot", data.lm, "--out", tmp_path / "curve.png"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands, default=str))
    printed = start(MAIN + COMMANDS, str(tmp_path / "commands.json")).stdout
    drawing = json.loads(printed.splitlines()[-1])
    assert drawing == {args[0]: args[0] == "plot" for args in commands}


def complete(words: str) -> set[str]:
    """Return the words that bash offers after `words`."""
    asked = COMPLETE | {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return set(start(MAIN + "main()", **asked).stdout.split())


def test_bash_completes_commands_and_options():
    assert complete("gpt-fast pre") == {"prepare", "pretrain", "predict"}
    assert complete("gpt-fast pretrain --ch") == {"--checkpoint-every", "--checkpoint-activations"}
    assert complete("gpt-fast finetune --label") == {"--label-column", "--labels"}


def test_bash_reads_the_completion_script():
    """The script that `--install-completion` writes is valid bash and registers a function for `gpt-fast`."""
    script = start(MAIN + "main()", _GPT_FAST_COMPLETE="source_bash").stdout
    bash = subprocess.run(["bash", "-c", f"{script}\ncomplete -p gpt-fast"], capture_output=True, text=True, check=True)
    assert "gpt_fast_completion gpt-fast" in bash.stdout


@pytest.mark.parametrize("module", ["gpt_fast", "gpt_fast_cli"])
def test_python_runs_the_package(module):
    run = [sys.executable, "-m", module, "--version"]
    assert subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout.startswith(
        "gpt-fast 0."
    )


def test_a_closed_standard_output_is_told():
    """A shell's `>&-` closes stdout. The command ends before it computes a result that nobody could read."""
    closed = subprocess.run(
        ["bash", "-c", '"$0" -m gpt_fast_cli --help >&-', sys.executable],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert closed.stderr == "gpt-fast: standard output: closed; expected a file, pipe or terminal\n"
    assert closed.returncode == 2


@pytest.mark.parametrize("imported", ["typer", "gpt_fast_cli.terminal", "numpy", "torch._C", "torch.nn", "tokenizers"])
def test_ctrl_c_during_the_start_is_quiet(imported, tmp_path):
    """SIGINT comes right after the import of a module, before the command line is built or inside torch's import."""
    run = [sys.executable, "-X", "importtime", "-m", "gpt_fast_cli", "evaluate", "--from", str(tmp_path)]
    with subprocess.Popen(run, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == imported:
                break
        os.kill(process.pid, signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
        assert process.stdout.read() == ""
    assert rest == []
    assert process.returncode == 130
