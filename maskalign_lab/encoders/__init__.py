"""What looks at images: teachers, autoencoders and their levels, and how the small ones are trained and graded."""
