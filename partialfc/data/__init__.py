"""From packs of JPEG images to batches of normalised tensors and identities."""
