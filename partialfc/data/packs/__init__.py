"""RecordIO packs, read and written by numpy alone."""
