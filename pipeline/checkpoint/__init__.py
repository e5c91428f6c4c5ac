"""What compress writes and every later stage reads: the checkpoint folder and its modules."""
