"""What savings cost in accuracy."""
