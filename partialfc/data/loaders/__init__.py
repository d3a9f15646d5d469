"""From records to batches on a device: DALI, or torch where there is none."""
