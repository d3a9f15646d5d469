"""What a run writes down: metrics, ledger, console, figures, report."""
