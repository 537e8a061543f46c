"""`python -m gpt_fast` is `gpt-fast`."""

from gpt_fast_cli.__main__ import main

main()
