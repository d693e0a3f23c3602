"""From lists of ops to executable plans: image ops become programs of two kernels, batch ops stay
callables."""
