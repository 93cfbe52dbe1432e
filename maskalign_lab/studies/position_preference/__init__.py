"""Study 02: what it trains to find where the position preference comes from, its maps, figures and findings."""
