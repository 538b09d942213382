"""Three scripts to run in order, and the demo that runs them all."""
