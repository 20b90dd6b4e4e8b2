"""Networks of our own: the SEDD diffusion transformer."""
