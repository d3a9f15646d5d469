"""Parts of ``partialfc evaluate``."""
