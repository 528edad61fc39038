"""A training run: its checks, parts, loop, validation, generated images, interruption, console and summary.

Formulas, DeepSpeed and the files of checkpoints belong in objective/, engine/ and checkpoint/.
"""
