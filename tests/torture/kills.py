"""Processes ended at random moments: writers, training, fine-tuning, chains."""
