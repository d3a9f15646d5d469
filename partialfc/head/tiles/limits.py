"""What the fused kernels can hold, for those who decide and those who compile."""

LARGEST_DIM = 512
"""A wider accumulator does not fit in the registers of a multiprocessor."""


STATIONARY = 64
"""Rows that a program keeps: what a tensor core of Hopper takes."""
