"""Run folders on disk: their files, checkpoints, settings, and the models that they hold."""
