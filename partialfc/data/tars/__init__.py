"""Images in tar shards, as WebDataset writes them, read where they lie: on a disk or at a URL."""
