"""Backbone, head and their optimizers: built from settings, and one step of them."""
