"""Settings: one declaration gives the option, its entry in a file, its saved value and its rule for resuming."""

import math
from pathlib import Path

import pytest
import yaml

from gpt_fast_settings.declaration import extra, option_name
from gpt_fast_settings.finetune import FinetuneSettings
from gpt_fast_settings.pretrain import PretrainSettings
from gpt_fast_settings.resume import resumed

KINDS = pytest.mark.parametrize("cls", [PretrainSettings, FinetuneSettings])
PATH = Path("runs/a/settings.yaml")


@KINDS
def test_every_setting_is_an_option_with_its_help(cls):
    from gpt_fast_cli.app import load_command

    command = load_command({PretrainSettings: "pretrain", FinetuneSettings: "finetune"}[cls])
    options = {option.removeprefix("--"): parameter for parameter in command.params for option in parameter.opts}
    for name, field in cls.fields().items():
        assert options[name].help.startswith(field.description), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "PretrainSettings has no 'stepz'; did you mean 'steps'?"),
        ({"bach_size": 3}, "PretrainSettings has no 'bach-size'; did you mean 'batch-size'?"),
        ({"steps": "many"}, "--steps many: expected a whole number"),
        ({"steps": 1.5}, "--steps 1.5: expected a whole number"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints 0: expected at least 1"),
        ({"max_skips": -1}, "--max-skips -1: expected at least 0"),
        ({"log_every": 0}, "--log-every 0: expected at least 1"),
        ({"lr": -1.0}, "--lr -1.0: expected at least 0"),
        ({"lr": math.nan}, "--lr nan: expected a finite number"),
        ({"final_lr": 2}, "--final-lr 2: expected at most 1"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: expected at least 0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0: expected more than 0"),
        ({"beta1": -0.1}, "--beta1 -0.1: expected at least 0"),
        ({"beta2": 1.0}, "--beta2 1.0: expected less than 1"),
        ({"precision": "int8"}, "--precision int8: expected 'float32', 'bfloat16' or 'float16'"),
        ({"optimizer": "lion"}, "--optimizer lion: expected 'adamw' or 'muon'"),
        ({"schedule": "steps"}, "--schedule steps: expected 'cosine', 'wsd', 'linear' or 'constant'"),
        ({"decay": 0.0}, "--decay 0.0: expected more than 0"),
        ({"z_loss": -1.0}, "--z-loss -1.0: expected at least 0"),
        ({"muon_lr": -1.0}, "--muon-lr -1.0: expected at least 0"),
        ({"data": "books"}, "--data books: expected a list"),
    ],
)
def test_a_setting_that_makes_no_sense(values, message):
    with pytest.raises(ValueError) as raised:
        PretrainSettings(out="a", **values)
    assert str(raised.value) == message


def test_a_required_setting_is_named():
    with pytest.raises(ValueError, match=r"--from: missing \(Run folder of the pre-trained model"):
        FinetuneSettings(out="a")


def test_the_command_line_wins_over_the_file(tmp_path):
    """Names in a file have - or _, and null counts as absent. A wrong value that an option replaces is no error."""
    path = tmp_path / "s.yaml"
    path.write_text("from: runs/lm\nbatch_size: 8\nweight-decay: 2e-3\nepochs: many\nvalid: null\n")
    settings = FinetuneSettings.read(path, {"out": Path("a"), "epochs": 7})
    assert (settings.source, settings.batch_size, settings.weight_decay) == (Path("runs/lm"), 8, 2e-3)
    assert settings.epochs == 7
    assert settings.model_fields_set == {"out", "source", "batch_size", "weight_decay", "epochs"}


@KINDS
def test_saved_settings_make_the_same_again(cls):
    settings = cls(out="a", source="runs/lm", seed=7, lr=1e-3, strategy="ddp", resume=True)
    saved = yaml.safe_load(yaml.safe_dump(settings.saved()))
    assert saved["from"] == "runs/lm"
    assert cls.read(None, saved | {"out": "b"}) == settings.changed(out="b", resume=False)


def other_value(name: str, value: object) -> object:
    """Return a valid value of the setting `name` that is not `value`."""
    others = {"objective": "mlm", "precision": "float16", "beta1": 0.5, "beta2": 0.5, "final_lr": 0.5, "dropout": 0.5}
    others |= {"metric": "loss", "class_weights": "balanced", "freeze": "trunk", "layer_decay": 0.5}
    others |= {"window_warmup": 0.5, "tracker": "mlflow", "lora_alpha": 8.0}
    others |= {"raw_dtype": "uint32", "optimizer": "muon", "schedule": "constant", "decay": 0.5}
    if name in others:
        return others[name]
    if name in ("source", "train", "valid"):
        return Path("other")
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if value == ():
        return ("other",) if name == "skip_label" else (Path("other"),)
    return "other" if name.endswith(("column", "er", "set", "task", "labels", "answers", "columns")) else 3


@KINDS
def test_every_setting_of_a_resumed_run(cls):
    """An omitted or repeated setting stays as it was. A changed one raises unless its declaration frees it."""
    required = {"out": Path("b"), "source": Path("runs/lm")}
    for name, field in cls.model_fields.items():
        kind = extra(field, "resume")
        if kind in ("command", "machine"):
            continue
        default = required.get(name, field.get_default())
        began = cls(**(required | {name: other_value(name, default)}))
        omitted = {key: value for key, value in required.items() if key != name or field.is_required()}
        if not field.is_required():
            assert getattr(resumed(cls(**omitted), PATH, began.saved()), name) == getattr(began, name), name
        assert resumed(cls(**dict(began)), PATH, began.saved()) == began
        again = cls(**(required | {name: default}))
        if default in (None, ()):
            continue
        if kind == "free":
            assert getattr(resumed(again, PATH, began.saved()), name) == default, name
        else:
            with pytest.raises(ValueError, match=f"^--{option_name(name)} .*: the run in runs/a began with"):
                resumed(again, PATH, began.saved())


def test_a_resumed_run_takes_its_machine_and_its_command_from_the_user():
    began = PretrainSettings(out="a", device="cuda", strategy="fsdp", overwrite=True)
    settings = resumed(PretrainSettings(out="b", device="cpu", resume=True), PATH, began.saved())
    assert (settings.out, settings.device, settings.strategy) == (Path("b"), "cpu", None)
    assert (settings.resume, settings.overwrite) == (True, False)


def test_a_resumed_run_is_of_the_same_command():
    """This includes a stopped run, whose command shows in its settings alone."""
    with pytest.raises(ValueError, match=r"^--resume: runs/a/settings.yaml has answers, .* gpt-fast pretrain began"):
        resumed(PretrainSettings(out="a"), PATH, FinetuneSettings(out="a", source="b").saved())
