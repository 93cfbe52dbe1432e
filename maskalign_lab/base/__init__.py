"""What every room uses and nothing of diffusion: errors, paths, files, checkpoints, devices, seeding, statistics."""
