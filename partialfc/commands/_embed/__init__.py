"""Parts of ``partialfc embed``."""
