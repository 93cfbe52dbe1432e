"""What is said of a network: losses, the judge, representations, verdicts."""
