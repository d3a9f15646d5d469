"""Ranks, their collectives, and what they must agree on."""
