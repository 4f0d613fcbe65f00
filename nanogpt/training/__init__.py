"""Training: modules, callbacks and the run directory, on top of Lightning."""
