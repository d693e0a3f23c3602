"""Load: loaders and processes by the dozen, 10,000 epochs, files larger than the memory."""
