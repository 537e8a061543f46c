"""Record the launches of every shipped configuration: `python -m tools.record_launches OUT`.

`launches` in benchmarks/ops/<op>.py yields the calls to record. They run on meta tensors with Triton's launch replaced
by a recorder, once for each architecture. So the gate compiles the code that a GPU would get: same configuration, same
constants, same specialisation of integers. tools.codegen compiles the record, under the Triton of the gate and without
PyTorch.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import catalogue
from benchmarks.topic import Topic
from kernels import launch_configs
from kernels.architectures import ARCHITECTURES

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def describe(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return {"signature", "constants", "divisible", "options"}: how Triton would specialise a kernel for a launch.

    "signature" maps the name of each parameter to its type such as "*bf16" or "i32", or to "constexpr" if it is a
    constant. None and the integer 1 count as constants too. "constants" maps the names of the constants to their
    values. "divisible" lists the names of all pointers, which are aligned to 16 bytes, and of integers that are
    multiples of 16. An integer that the kernel marks `do_not_specialize` is never listed, and it is no constant if it
    is 1.

    "options" maps those of OPTIONS that the launch sets, such as "num_warps", to their values. `args` and `kwargs` are
    the arguments of the launch.
    """
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype].removeprefix('*')}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)  # allocations are aligned
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    return {"signature": signature, "constants": constants, "divisible": divisible, "options": options}


def record(topic: Topic, target: int, found: dict[str, dict[str, Any]]) -> None:
    """Add the kernel launches of an op's topic on the architecture `target`, such as 90, to `found`. Launch nothing.

    `topic.launches` yields labels and the calls that launch. A value of `found` is a dict that describes a launch:
    "key" (its name: op, kernel, label and a number if these repeat), "module" and "kernel" (where the kernel is),
    "target", "signature", "constants", "divisible" and "options". Its key in `found` is the JSON of all but "key". A
    launch that is already in `found` is not added, since several shapes and several ops may use one kernel.
    """
    op = topic.name
    kernels = importlib.import_module(f"kernels.{op}")
    keys = {launch["key"] for launch in found.values() if launch["target"] == target}
    for label, launch in topic.launches(kernels):  # type: ignore[misc]

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, label: str = label, **kwargs: Any) -> None:
            """Add this launch of `kernel` to the outer `found`, in place of `JITFunction.run`. Launch nothing.

            The remaining arguments are those of the launch; `grid` and `warmup` are ignored. A launch that is in
            `found` already is not added. `label` belongs to the call that launches.
            """
            what = {"module": kernel.fn.__module__, "kernel": kernel.__name__, "target": target}
            what |= describe(kernel, args, kwargs)
            key = name = f"{op} {kernel.__name__.strip('_').removesuffix('_kernel')} {label}"
            number = 2
            while key in keys:  # one kernel, several products
                key, number = f"{name} {number}", number + 1
            if found.setdefault(json.dumps(what), {"key": key, **what})["key"] == key:
                keys.add(key)

        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(launch_configs, "architecture", return_value=target),
            mock.patch.object(launch_configs, "multiprocessors", return_value=132),
            launch_configs.shipped_alone(),
        ):
            launch()


def main() -> None:
    """Write the launches of each op on each architecture, as a JSON list, to the file that the command line names.

    Exit with a message if a kernel file has no launches in benchmarks/ops, or if launches have no kernel file. Run it
    from the root of the repository.
    """
    launched = {name: topic for name, topic in catalogue.ops().items() if topic.launches}
    present = {path.stem for path in Path("kernels").glob("*.py") if "\ndef forward(" in path.read_text("utf-8")}
    if present != set(launched):
        sys.exit(
            f"tools.record_launches: benchmarks/ops has no launches of {present - set(launched) or 'nothing'}, "
            f"kernels/ has no kernel for {set(launched) - present or 'nothing'}"
        )
    found: dict[str, dict[str, Any]] = {}
    for topic in launched.values():
        for architecture in ARCHITECTURES:
            record(topic, architecture.capability, found)
    Path(sys.argv[1]).write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
