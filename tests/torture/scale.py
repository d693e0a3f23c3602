"""Scale: 1.28 and 14 million samples, thousands of classes."""
