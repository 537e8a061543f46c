"""The settings of trainings, each declared once: the command line, `--config` files, settings.yaml and what a resumed
run may change all follow from the declaration.

This package lies outside `gpt_fast`, whose import loads torch: the command line reads the settings for `--help` and
completion, `gpt_fast.training` receives them.
"""
