"""What any training command needs: ranks, checkpoints, run folders, models, optimisers, probes."""
