"""Held-out sets: embeddings of their images, and the field's numbers of them."""
