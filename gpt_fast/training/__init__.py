"""From text and tables to run folders: pre-training, fine-tuning, evaluation.

`loop` is the training loop, `pretrain` and `finetune` set it up, `evaluate` and `compare` read what they wrote;
`runs` knows the layout of a run folder. `GraphedStep` serves loops outside of this library, too.
"""

from .engine.graph import GraphedStep

__all__ = ["GraphedStep"]
