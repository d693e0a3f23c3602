"""Commands as jobs: on Slurm, and in chains of stages."""
