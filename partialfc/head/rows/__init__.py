"""The rows of the centers between steps: formats, states, updates, and where they lie."""
