"""Numba loops without Python objects: random numbers, hash, file reads, resize, colour, blur.

`device` functions are called by other kernels only; a `kernel` is an entry point from Python,
compiled for one signature and cached on disk. Shapes: N samples, C channels, H W pixels; images in
work are float32 CHW in [0, 1].
"""
