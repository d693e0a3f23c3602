"""The published view recipes, one short function each.

A recipe takes `small_images` and returns its views by name, `{"view_0": View, ...}`. `small_images`
selects the variant for images of CIFAR's size: no blur, and jitter of strength 0.5 (SimCLR,
appendix B.9). The functions contain only what differs between methods. To add a recipe, write a
function and list it in `RECIPES`.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.view import View

# Every recipe with two views starts from this crop (8 to 100 % of the area) and flip.
CROP_FLIP = View(flip_prob=0.5)
# Jitter of BYOL and its successors (BYOL, appendix B): strength 0.5, with less saturation.
BYOL_COLOR = replace(
    CROP_FLIP, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray_prob=0.2
)


def _simclr_color(strength: float) -> View:
    """SimCLR's colour distortion (appendix A): jitter of `strength` with p 0.8, grey with p 0.2."""
    factor = 0.8 * strength
    return replace(
        CROP_FLIP,
        jitter_prob=0.8,
        brightness=factor,
        contrast=factor,
        saturation=factor,
        hue=0.2 * strength,
        gray_prob=0.2,
    )


def _blur(view: View, prob: float, small_images: bool) -> View:
    return view if small_images else replace(view, blur_prob=prob)


def ffcv_ssl(small_images: bool = False) -> dict[str, View]:
    """FFCV-SSL's default pair: blur on view 0 only, always; solarization on view 1 only."""
    return {
        "view_0": _blur(BYOL_COLOR, 1.0, small_images),
        "view_1": replace(BYOL_COLOR, solarize_prob=0.2),
    }


def simclr(small_images: bool = False) -> dict[str, View]:
    """SimCLR's symmetric pair (Chen et al. 2020, appendix A; B.9 for small images)."""
    view = _blur(_simclr_color(0.5 if small_images else 1.0), 0.5, small_images)
    return {"view_0": view, "view_1": view}


def byol(small_images: bool = False) -> dict[str, View]:
    """BYOL's asymmetric pair (Grill et al. 2020, table 6). VICReg and Barlow Twins use it too."""
    return {
        "view_0": _blur(BYOL_COLOR, 1.0, small_images),
        "view_1": replace(_blur(BYOL_COLOR, 0.1, small_images), solarize_prob=0.2),
    }


def crop_gray(small_images: bool = False) -> dict[str, View]:
    """Crop, flip and grey on both views (FFCV-SSL paper, 3.2), at any size of images.

    The paper's text says grey on one branch: that is `view_1.gray_prob: 0`.
    """
    view = replace(CROP_FLIP, gray_prob=0.2)
    return {"view_0": view, "view_1": view}


def suncet_cifar(small_images: bool = True) -> dict[str, View]:
    """SuNCEt's CIFAR-10 pair (Assran et al. 2020): always SimCLR's pair for small images."""
    return simclr(small_images=True)


def paws_cifar(small_images: bool = True) -> dict[str, View]:
    """PAWS' CIFAR-10 pair: gentler crops; solarization and equalization replace grey and blur."""
    view = replace(
        _simclr_color(0.5),
        crop_scale=(0.5, 1.0),
        gray_prob=0.0,
        solarize_prob=0.2,
        equalize_prob=0.2,
    )
    return {"view_0": view, "view_1": view}


def _multi_crop(
    small_images: bool,
    num_local: int,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
) -> dict[str, View]:
    first = replace(_blur(BYOL_COLOR, 1.0, small_images), crop_scale=global_scale)
    second = replace(
        _blur(BYOL_COLOR, 0.1, small_images), crop_scale=global_scale, solarize_prob=0.2
    )
    local = replace(
        _blur(BYOL_COLOR, 0.5, small_images), crop_scale=local_scale, size_scale=96 / 224
    )
    views = [first, second] + [local] * num_local
    return {f"view_{index}": view for index, view in enumerate(views)}


def dino(small_images: bool = False) -> dict[str, View]:
    """DINO's multi-crop for CNNs (Caron et al. 2021): 2 global and 6 local views."""
    return _multi_crop(small_images, 6, global_scale=(0.14, 1.0), local_scale=(0.05, 0.14))


def dino_vit(small_images: bool = False) -> dict[str, View]:
    """DINO's multi-crop for vision transformers: two global views and ten local ones."""
    return _multi_crop(small_images, 10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))


def instance(small_images: bool = False) -> dict[str, View]:
    """Instance SimCLR (FFCV-SSL paper, 3.4), at any size of images: a crop, the same crop with
    noise as its positive, and a small patch of the image as its only negative.

    The paper specifies neither noise nor patch: set `view_1.noise_std` and `view_2.crop_scale`. The
    default noise is clearly visible, and the default patch has a side of 1/5 to 2/5 of the image's.
    """
    return {
        "view_0": CROP_FLIP,
        "view_1": replace(CROP_FLIP, noise_std=0.1, link="view_0", linked=("crop", "flip")),
        "view_2": replace(CROP_FLIP, crop_scale=(0.04, 0.16)),
    }


def supervised(small_images: bool = False) -> dict[str, View]:
    """One view for supervised training and fine-tuning: crop and flip, at any size of images."""
    return {"view_0": CROP_FLIP}


def evaluation(small_images: bool = False) -> dict[str, View]:
    """One view without randomness: the middle 224/256 of the short side; all of it if small."""
    return {"view_0": View(crop="center", center_ratio=1.0 if small_images else 224 / 256)}


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        ffcv_ssl,
        simclr,
        byol,
        crop_gray,
        suncet_cifar,
        paws_cifar,
        dino,
        dino_vit,
        instance,
        supervised,
        evaluation,
    )
}
