"""Rendered faces: identities and photos that are nobody's, for the demo and the tests."""
