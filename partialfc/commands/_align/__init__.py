"""Parts of ``partialfc align``."""
