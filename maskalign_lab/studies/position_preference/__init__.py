"""Study 02: where the position preference comes from, its arms, measures and films, and alignment under every lens."""
