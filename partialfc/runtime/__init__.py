"""One rank's process: start, network, watchdog, slow ranks, preemption."""
