"""Study 09: what a step costs and why, what the papers' trainings take, and trainings with one thing wrong."""
