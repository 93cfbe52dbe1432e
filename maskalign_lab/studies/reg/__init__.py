"""Study 04: its opening, traces of a class token, its exchange, film, figures and findings; its arms, and what is read from their tokens."""
