"""What composing costs: seconds and memory beside training, and how both grow."""
