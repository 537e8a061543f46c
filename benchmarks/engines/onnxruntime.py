"""GPT-2 on ONNX Runtime: exported by torch.onnx with its cache as inputs and outputs."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.engines.cached_gpt import CachedGPT, greedy
from benchmarks.models.plain_gpt import PlainGPT
from gpt_fast import GPTForCausalLM

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
PRECISIONS = ("float32", "int8")
FILE = "model.onnx"


def missing(precision: str) -> str | None:
    """Return None, for no reason to skip: ONNX Runtime computes in every precision of this module on every CPU."""
    return None


def convert(model: GPTForCausalLM, precision: str, folder: Path) -> None:
    """Write the model to `folder`/model.onnx with its weights in `precision`, "float32" or "int8".

    The key/value cache is inputs and outputs of the graph. In "int8", weights have a scale for each output channel, and
    activations are quantized at run time, before each product.
    """
    cached = CachedGPT(PlainGPT(model.config).copy_weights(model).eval(), masks=True)
    example, any_size = cached.example(), torch.export.Dim.DYNAMIC
    past = range(len(example) - 1)
    path = folder / FILE if precision == "float32" else folder / "float32.onnx"
    torch.onnx.export(
        cached, example, path,
        input_names=["tokens", *(f"past.{i}" for i in past)],
        output_names=["logits", *(f"cache.{i}" for i in past)],
        dynamic_shapes=({0: any_size, 1: any_size}, tuple({0: any_size, 2: any_size} for _ in past)),
        opset_version=18, dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, folder / FILE, weight_type=QuantType.QInt8, per_channel=True)
        path.unlink()


class Generator:
    """Session of the model. Every run returns the whole cache as new arrays."""

    def __init__(self, folder: Path, precision: str):
        """Load the model that `convert` wrote to `folder`/model.onnx, with as many threads as PyTorch has now.

        The file holds the precision; `precision` changes nothing.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Between calls its threads would take the cores of whoever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_inputs()]
        _, self.heads, _, self.size = self.session.get_inputs()[1].shape

    def __call__(self, tokens: Tensor, new: int) -> Tensor:
        """Generate greedily. Return tokens [B, T + new]: the prompt `tokens` [B, T], then `new` tokens.

        Each call starts with an empty cache.
        """
        past = [np.zeros((len(tokens), self.heads, 0, self.size), np.float32)] * (len(self.names) - 1)

        def logits(read: Tensor) -> Tensor:
            """Run the model on tokens `read` [B, T] and return the logits [B, V] after the last one.

            The cache is the variable `past` of the enclosing call, which this function replaces by the new cache.
            """
            nonlocal past
            out, *past = self.session.run(None, dict(zip(self.names, [read.numpy(), *past], strict=True)))
            return torch.from_numpy(out)

        return greedy(logits, tokens, new)
