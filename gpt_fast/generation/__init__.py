"""Text generation: `generate` and `DecodeSession`, which keeps keys and values between calls."""

from .session import DecodeSession
from .text import GenerateOutput, generate

__all__ = ["DecodeSession", "GenerateOutput", "generate"]
