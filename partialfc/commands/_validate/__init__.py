"""Parts of ``partialfc validate``."""
