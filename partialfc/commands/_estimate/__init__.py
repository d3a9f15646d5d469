"""Parts of ``partialfc estimate``."""
