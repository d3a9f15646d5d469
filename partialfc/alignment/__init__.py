"""Faces found in a photo and cut out as arcface's images are."""
