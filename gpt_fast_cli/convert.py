"""The command `gpt-fast convert`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import AsJson, err, print_json, print_table, require_train_extra, say

NOTHING = "nothing of it is left"
FORMATS = ("gpt-fast", "transformers", "nanogpt")
_CHECKPOINTS = "Checkpoints of nanoGPT and llm.c"


def convert(
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            help="Run folder of gpt-fast, folder of a transformers GPT-2 or GPT-1 model, nanoGPT's ckpt.pt, or llm.c's "
            "model_*.bin.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, or with --to nanogpt the file; it must not exist yet.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(FORMATS),
            help="Format to write. Without it a run folder becomes transformers', and all else a run folder. gpt-fast "
            "merges the adapter of a run with --lora-rank into its base.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="clm|mlm|classifier",
            help="Model to make from a transformers folder, with the weights that it shares with the folder's model. "
            "By default the model that holds all of the folder's weights; if there is none, --head is required.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="tokenizer.json that the model was trained with; GPT-2's for most. A checkpoint holds none.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    characters: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For a character-level model: its training text (input.txt). A meta.pkl is a pickle and not read.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(help="Attention heads, for a bare state dict, such as minGPT's.", rich_help_panel=_CHECKPOINTS),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            metavar="gelu|gelu_tanh",
            help="Activation, if it is not nanoGPT's gelu: gelu_tanh for minGPT, build-nanogpt and nanoGPT before "
            "2023-05.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model of transformers, nanoGPT, minGPT, build-nanogpt or llm.c to a run folder, or back, bit for bit.

    A run folder becomes a model of transformers or nanoGPT. A source that lacks a weight, or has one that its
    configuration does not name, is refused, and so is a model that the other library cannot hold. Folders are
    safetensors. A ckpt.pt is read with torch.load(weights_only=True), which runs no code. OpenAI's original TensorFlow
    files of GPT-2 are not read: transformers converts them.

    [bold]Examples[/bold]

    gpt-fast convert --from runs/lm --out exported/lm

    gpt-fast convert --from models/gpt2 --out runs/gpt2 --head classifier

    gpt-fast convert --from out/ckpt.pt --out runs/nanogpt --tokenizer gpt2/tokenizer.json

    gpt-fast convert --from log124M/model_00018865.bin --out runs/llmc --tokenizer gpt2/tokenizer.json

    gpt-fast convert --from runs/lm --to nanogpt --out out/ckpt.pt

    gpt-fast convert --from runs/lora --to gpt-fast --out runs/merged
    """
    if to is not None and to not in FORMATS:
        raise ValueError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    options = {"--tokenizer": tokenizer, "--characters": characters, "--heads": heads, "--activation": activation}
    if source.is_file():
        result = _from_file(source, out, to, head, options)
    else:
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{option} {value}: {source} is no checkpoint of nanoGPT or llm.c; leave it out")
        result = _from_folder(source, out, to, head)
    if as_json:
        print_json(result)
        return
    rows = [("model", result["model"]), ("from", result["from"]), ("numbers", f"{result['numbers']:,}")]
    rows += [(name, str(result[name])) for name in ("dtype", "activation") if name in result]
    print_table(f"{out}", rows)


def _from_file(source: Path, out: Path, to: str | None, head: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of nanoGPT or llm.c to the run folder `out`. Print on stderr what was left out.

    A line is also printed if no tokenizer was written. `to` is the value of --to, "gpt-fast" or None. `head` is the
    value of --head, which must be None for a checkpoint. `options` has the keys "--tokenizer", "--characters",
    "--heads" and "--activation"; the value is None for an option that was not given.

    Return a dict with `model` (its class), `from` (the format), `numbers` (how many parameters), `dtype`, `activation`,
    `tied`, `tokenizer` (True if one was written) and `left_out` (entries that were not used). Raise `ValueError` for
    options that do not fit, and `FileExistsError` if `out` exists.
    """
    if to not in (None, "gpt-fast"):
        raise ValueError(f"--to {to}: {source} is a checkpoint, which becomes a run folder first; expected gpt-fast")
    if head is not None:
        raise ValueError(f"--head {head}: {source} holds a language model; gpt-fast finetune puts another head on it")
    require_train_extra()
    from gpt_fast._disk import writing
    from gpt_fast.integrations.nanogpt.folder import from_checkpoint

    given = {name.removeprefix("--"): value for name, value in options.items()}
    with err.status("converting"), writing(out, NOTHING):
        result = from_checkpoint(source, out, **given)
    if result["left_out"]:
        say(f"gpt-fast: left out of {source}: {', '.join(result['left_out'])}")
    if not result["tokenizer"]:
        say(
            f"gpt-fast: {source} holds no tokenizer; generate, evaluate and finetune need {out / 'tokenizer.json'}, "
            "the one that the model was trained with (--tokenizer, or --characters)"
        )
    return result


def _from_adapter(source: Path, out: Path, to: str | None, head: str | None) -> dict[str, Any]:
    """Merge the LoRA adapter of the run in `source` into its base model, and write the model to `out`.

    `to` is the format to write, "gpt-fast", "transformers" or "nanogpt"; None stands for "transformers". `head` is the
    value of the option --head, which has to be None.

    Return a dict with `model` (the written model's class, or "nanoGPT"), `from` and `numbers` (how many parameters),
    and for transformers `left_out` (parts that the format cannot hold). `from` is the text "the adapter in FOLDER" for
    the format "gpt-fast", else the merged model's class. Raise `ValueError` for a `head`, and `FileExistsError` if
    `out` exists.
    """
    from tempfile import TemporaryDirectory

    require_train_extra()
    from gpt_fast._disk import writing
    from gpt_fast._files import new_folder
    from gpt_fast.training.runs.load import write_merged

    if to != "gpt-fast":
        with TemporaryDirectory() as folder:
            merged = Path(folder) / source.resolve().name
            merged.mkdir()
            write_merged(source, merged)
            return _from_folder(merged, out, to, head)
    if head is not None:
        raise ValueError(f"--head {head}: is for a folder of transformers; leave it out")
    if out.exists():
        raise FileExistsError(f"--out {out}: exists already; expected a folder that does not")
    with err.status("merging"), writing(out, NOTHING), new_folder(out) as made:
        model = write_merged(source, made)
    return {"model": type(model).__name__, "from": f"the adapter in {source}", "numbers": model.num_parameters()}


def _from_folder(source: Path, out: Path, to: str | None, head: str | None) -> dict[str, Any]:
    """Convert a run folder, or a folder of transformers, and write the model to `out`.

    `to` is the format to write, "gpt-fast", "transformers" or "nanogpt". If it is None, a run folder becomes a folder
    of transformers, and the reverse. A run folder with a LoRA adapter is left to `_from_adapter`; no other run folder
    may become "gpt-fast". `head` chooses the new model's class for a folder of transformers: "clm", "mlm" or
    "classifier", or None for the one that fits the saved class. For a run folder `head` must be None.

    Return the dict of `_from_adapter` for an adapter. Otherwise it has `model` (the new model's class, or "nanoGPT"),
    `from` (the old model's class) and `numbers` (how many parameters). A run folder that becomes a folder of
    transformers also gives `left_out` (parts that it cannot hold), which is printed on stderr too. Raise `ValueError`
    for options that do not fit the folder, and `FileExistsError` if `out` exists.
    """
    if (source / "adapter_config.json").is_file() and (source / "config.json").is_file():
        return _from_adapter(source, out, to, head)
    checkpoint = source / "ckpt.pt"
    if checkpoint.is_file() and not (source / "config.json").exists():
        raise ValueError(f"{source}: nanoGPT's folder; expected its checkpoint, --from {checkpoint}")
    if to == "nanogpt":
        if head is not None:
            raise ValueError(f"--head {head}: is for a folder of transformers; leave it out")
        require_train_extra()
        from gpt_fast._disk import writing
        from gpt_fast.integrations.nanogpt.folder import to_checkpoint

        with err.status("converting"), writing(out, NOTHING):
            return to_checkpoint(source, out)
    if find_spec("transformers") is None:
        raise ValueError("this command needs transformers; pip install gpt-fast[hf]")
    from gpt_fast._disk import writing
    from gpt_fast.integrations.huggingface.folder import convert_folder

    with err.status("converting"), writing(out, NOTHING):
        result = convert_folder(source, out, head, to)
    if result.get("left_out"):
        say(f"gpt-fast: left out of {source}: {', '.join(result['left_out'])}")
    return result
