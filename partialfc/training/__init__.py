"""A run, readable as the data flow."""
