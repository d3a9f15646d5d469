"""Parts of ``partialfc identities``."""
