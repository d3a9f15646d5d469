"""Copies of the ranks' parts in the memory of other hosts, to go on from where a host is lost."""
