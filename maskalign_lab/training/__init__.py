"""What a method is, the methods that no study builds, the training loop, and what stops it."""
