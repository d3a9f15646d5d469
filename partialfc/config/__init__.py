"""Every setting of a run: what there is, how it is read, and how it is written back."""

from partialfc.config.tree import Config, config_hash, help_text, load, to_toml
from partialfc.errors import ConfigError

__all__ = ["Config", "ConfigError", "config_hash", "help_text", "load", "to_toml"]
