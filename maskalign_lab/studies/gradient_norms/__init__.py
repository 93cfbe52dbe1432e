"""Study 01: its film, its opening, and its findings in words."""
