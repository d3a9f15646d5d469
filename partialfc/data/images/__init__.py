"""One image: what its header says, whether it may be decoded."""
