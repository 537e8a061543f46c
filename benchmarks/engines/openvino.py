"""GPT-2 on OpenVINO: the cache as the model's state, one infer request a step."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engines.cached_gpt import CachedGPT, greedy
from benchmarks.models.plain_gpt import PlainGPT
from gpt_fast import GPTForCausalLM

PACKAGES = ("openvino", "nncf")
PRECISIONS = ("float32", "bfloat16", "int8", "int4")
FILE = "model.xml"
# Without hints OpenVINO computes in bfloat16 where the CPU has its products, and keeps 8 bits of keys and values.
HINTS: dict[str, dict[str, Any]] = {
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
}


def missing(precision: str) -> str | None:
    """Return the reason why OpenVINO cannot compute in `precision` on this CPU, or None if it can.

    Only "bfloat16" is checked, which needs a CPU with bfloat16 instructions. Any other value returns None. Raise
    `ImportError` if OpenVINO is not installed.
    """
    import openvino as ov

    if precision == "bfloat16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO has no bfloat16 products for this CPU"
    return None


def convert(model: GPTForCausalLM, precision: str, folder: Path) -> None:
    """Write the model to `folder`/model.xml in OpenVINO's format, with its key/value cache as state inside the model.

    `precision` is one of this module's PRECISIONS: "float32", "bfloat16", "int8" or "int4". In "int8" and "int4", nncf
    compresses the weights with its default options. In "bfloat16" the file is the same as in "float32", and `Generator`
    asks for the precision.
    """
    import openvino as ov

    cached = CachedGPT(
        PlainGPT(model.config).copy_weights(model).eval(), masks=False
    )  # OpenVINO 2026.4 misreads masks of batches in bfloat16
    found = ov.convert_model(cached, example_input=cached.example())
    keep_cache(found, model.config.num_heads, model.config.hidden_dim // model.config.num_heads)
    if precision in ("int8", "int4"):
        import nncf

        modes = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_SYM}
        found = nncf.compress_weights(found, mode=modes[precision])
    ov.save_model(found, folder / FILE, compress_to_fp16=False)


def keep_cache(model: Any, heads: int, size: int) -> None:
    """Turn the inputs and outputs of an OpenVINO model that hold keys and values into state, in place.

    `model` is a converted `CachedGPT` with `heads` heads of `size` elements. Its inputs are the tokens, then the
    caches; its outputs are the logits, then the new caches. Afterwards the caches are variables inside the model, which
    start empty. A new input `beam_idx` [B] has for each row the row of the cache that it continues. The input for
    tokens is named `tokens`, and the output `logits`.
    """
    import openvino as ov
    from openvino import opset13 as ops

    tokens, *past = model.inputs
    tokens.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
    tokens.get_tensor().set_names({"tokens"})
    rows = ops.parameter([-1], np.int32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([rows])
    model.outputs[0].get_tensor().set_names({"logits"})
    batch = ops.gather(ops.shape_of(tokens, output_type="i64"), ops.constant([0]), ops.constant(0))
    empty = ops.broadcast(
        ops.constant(np.float32(0)), ops.concat([batch, ops.constant(np.array([heads, 0, size], np.int64))], axis=0)
    )
    results = [output.get_node() for output in model.outputs[1:]]
    for place, (parameter, result) in enumerate(zip([entry.get_node() for entry in past], results, strict=True)):
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, heads, -1, size]), ov.Type.f32
        info.variable_id = f"cache.{place}"
        variable = ov.op.util.Variable(info)
        model.add_variables([variable])
        read = ops.read_value(empty, variable)
        ordered = ops.gather(read, rows, ops.constant(0))
        parameter.output(0).replace(ordered.output(0))
        model.add_sinks([ov.op.assign(result.input_value(0).get_node(), variable)])
        model.remove_result(result)
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


class Generator:
    """Compiled model with its state."""

    def __init__(self, folder: Path, precision: str):
        """Compile the model that `convert` wrote to `folder`/model.xml, with as many threads as PyTorch has now.

        In "float32" and "bfloat16", `precision` sets the dtype of arithmetic and cache. In other precisions OpenVINO
        chooses.
        """
        import openvino as ov

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = ov.Core().compile_model(folder / FILE, "CPU", options | HINTS.get(precision, {}))
        self.request = self.compiled.create_infer_request()

    def __call__(self, tokens: Tensor, new: int) -> Tensor:
        """Generate greedily. Return tokens [B, T + new]: the prompt `tokens` [B, T], then `new` tokens.

        Each call starts with an empty cache.
        """
        self.request.reset_state()
        rows = np.arange(len(tokens), dtype=np.int32)

        def logits(read: Tensor) -> Tensor:
            inputs = {"tokens": read.numpy(), "beam_idx": rows}
            return torch.from_numpy(self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"])

        return greedy(logits, tokens, new)
