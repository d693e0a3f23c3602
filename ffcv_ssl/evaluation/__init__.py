"""Frozen and fine-tuned evaluations of a checkpoint: protocols, studies and what they share."""
