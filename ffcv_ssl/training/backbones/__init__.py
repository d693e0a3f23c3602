"""Backbones beside torchvision's ResNets, one per file, found by the file's name.

Each file has a function `make(stem) -> (backbone, D)`: a module (B, 3, H, W) -> (B, D), and its D.
`--model.backbone tiny` takes `tiny.py`.
"""
