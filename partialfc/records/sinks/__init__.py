"""Sinks of other people's software, by name: whatever follows a run beside its own files."""
