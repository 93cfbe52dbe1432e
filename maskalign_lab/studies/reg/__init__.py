"""Study 04: traces of a class token, its exchange, and the film."""
