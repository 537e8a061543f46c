"""The settings of trainings, each declared once.

The command line, `--config` files, settings.yaml and the changes that a resumed run may make all follow from the
declaration. This package lies outside `gpt_fast`, whose import loads torch: the command line reads the settings for
`--help` and completion, and `gpt_fast.training` receives them.
"""
