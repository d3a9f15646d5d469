"""Image folders and lists, read as a pack of them would be."""
