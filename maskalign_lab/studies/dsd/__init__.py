"""Study 08: what a diffusion loss does to a latent that it may change, in closed form and in the smallest system."""
