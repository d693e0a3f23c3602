"""From lists of ops to executable plans: image ops become tables for two kernels, batch ops stay
callables."""
