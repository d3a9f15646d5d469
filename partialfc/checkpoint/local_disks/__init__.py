"""Checkpoints on disks that hosts do not share: ``checkpoint.shared = false``."""
