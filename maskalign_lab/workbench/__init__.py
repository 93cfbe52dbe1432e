"""What makes a notebook a workbench: figures, scrubber, offline page, parameters, jobs, doctor, commands; nothing of diffusion."""
