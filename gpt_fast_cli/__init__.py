"""`gpt-fast`, the command line of `gpt_fast`: one file a command, `options.py` for what several share.

This package lies outside `gpt_fast`, whose import loads torch.
"""
