"""Verification and benchmark sets of the field, read without an unpickler."""
