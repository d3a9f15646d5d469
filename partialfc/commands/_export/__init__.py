"""Parts of ``partialfc export``."""
