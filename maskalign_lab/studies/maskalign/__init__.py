"""Study 05: stability and preference under a mask, influence between tokens, and the film."""
