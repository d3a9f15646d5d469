"""Parts of ``partialfc convert-checkpoint``."""
