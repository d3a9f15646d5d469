"""The page on how a run is doing."""
