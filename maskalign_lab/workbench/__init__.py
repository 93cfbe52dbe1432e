"""What makes a notebook a workbench and knows nothing of diffusion: pictures, scrubber, offline page, parameters, jobs."""
