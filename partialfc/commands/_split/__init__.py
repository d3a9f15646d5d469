"""Parts of ``partialfc split``."""
