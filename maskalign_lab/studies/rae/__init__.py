"""Study 07: width and target on one image, arms on RAE latents, the decoder under noise, figures and the film."""
