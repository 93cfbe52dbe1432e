"""Study 02: where the position preference comes from, and what networks rely on."""
