"""Parts of ``partialfc pack``."""
