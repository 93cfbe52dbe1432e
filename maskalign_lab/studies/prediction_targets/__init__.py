"""Study 03: its arms, the toy, measures and figures."""
