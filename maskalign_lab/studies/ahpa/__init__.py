"""Study 06: arms, what a router does and could do, what levels hold, figures and the film."""
