"""`nn.TransformerEncoderLayer` and the notes' `TransformerDecoder` on this library's ops."""

from typing import Any

import torch.nn as nn

from .report import Patch, Report


def plan(name: str, module: Any, report: Report) -> list[Patch] | None:
    return None
