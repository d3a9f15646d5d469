"""What Prometheus reads of a run, and where it finds it."""
