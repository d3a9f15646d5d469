"""What ``partialfc cluster`` is made of."""
