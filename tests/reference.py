"""NumPy twins of the kernels: float64, slow and obvious.

Shapes: H W pixels, C channels. An image is float (H, W, 3) in [0, 1]. Random numbers are exact: the
same key gives the same draw as the kernels, to the last digits of a float64.
"""

import math

import numpy as np

LOW32 = (1 << 32) - 1
LUMA = np.array([0.2989, 0.587, 0.114])


def philox(key, counter):
    """Four words of Philox4x32-10, of a 64-bit key and a counter of four words; Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & LOW32, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW32, (p0 >> 32) ^ c3 ^ k1, p0 & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def uniforms(key, epoch, sample, occurrence, block):
    """Four uniform numbers in [0, 1): number `block` of an op's stream at a sample's turn."""
    high = (sample >> 32) << 16 | occurrence
    words = philox(key, (block, sample & LOW32, epoch, high))
    return [word / 2**32 for word in words]


def shuffle(key, epoch, values):
    """The values as Fisher and Yates leave them."""
    values = list(values)
    for last in range(len(values) - 1, 0, -1):
        w0, w1, _, _ = philox(key, (last, epoch, 0, 0))
        other = ((w0 << 32 | w1) * (last + 1)) >> 64
        values[last], values[other] = values[other], values[last]
    return values


def draw_random_crop(key, epoch, sample, occurrence, scale, ratio, height, width):
    """(top, left, height, width): ten attempts, then the largest central box that `ratio`
    allows.
    """
    for attempt in range(10):
        u_area, u_ratio, u_top, u_left = uniforms(key, epoch, sample, occurrence, attempt)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def draw_switch(key, epoch, sample, occurrence, probability):
    """Whether an op that is only on or off is on."""
    return uniforms(key, epoch, sample, occurrence, 0)[0] < probability


def draw_sigma(key, epoch, sample, occurrence, probability, sigma):
    """Standard deviation of the blur; 0: none."""
    u_applied, u_sigma, _, _ = uniforms(key, epoch, sample, occurrence, 0)
    return sigma[0] + (sigma[1] - sigma[0]) * u_sigma if u_applied < probability else 0.0


def draw_jitter(key, epoch, sample, occurrence, probability, strengths):
    """(applied, brightness, contrast, saturation, hue, order); strengths: of the four, in this
    order.
    """
    u_applied, u_order, u_brightness, u_contrast = uniforms(key, epoch, sample, occurrence, 0)
    u_saturation, u_hue, _, _ = uniforms(key, epoch, sample, occurrence, 1)
    factors = []
    for u, strength in zip((u_brightness, u_contrast, u_saturation), strengths):
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        factors.append(low + (high - low) * u)
    hue = strengths[3] * (2 * u_hue - 1)
    return u_applied < probability, *factors, hue, jitter_order(int(24 * u_order))


def jitter_order(number):
    """Permutation `number` (0 to 23) of the four steps: digits in bases 4, 3, 2, 1 pick from those
    left.
    """
    left, order = [0, 1, 2, 3], []
    while left:
        number, pick = divmod(number, len(left))
        order.append(left.pop(pick))
    return order


def draw_noise_key(key, epoch, sample, occurrence, probability):
    """The 48-bit key of a view's noise; 0: none."""
    u_applied, u_high, u_low, _ = uniforms(key, epoch, sample, occurrence, 0)
    noise_key = int(u_high * 2**24) << 24 | int(u_low * 2**24)
    return max(noise_key, 1) if u_applied < probability else 0


def _triangle(x):
    return np.maximum(1.0 - np.abs(x), 0.0)


def _keys_cubic(x, a=-0.5):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def axis_matrix(begin, extent, size, num_outputs, cubic):
    """(outputs, size): antialiased weights of one axis; pixels outside the box (rounded outwards)
    take no part.
    """
    scale = extent / num_outputs
    centres = begin + scale * (np.arange(num_outputs) + 0.5)
    positions = np.arange(size) + 0.5
    kernel = _keys_cubic if cubic else _triangle
    weights = kernel((positions - centres[:, None]) / max(scale, 1.0))
    inside = (positions > math.floor(begin)) & (positions < math.ceil(begin + extent))
    weights = weights * inside
    return weights / weights.sum(1, keepdims=True)


def resized_crop(image, box, size, cubic=False):
    """A box (top, left, height, width) of an image (H, W, 3), resized with antialiasing to size
    (H, W).
    """
    top, left, box_height, box_width = box
    rows = axis_matrix(top, box_height, image.shape[0], size[0], cubic)
    columns = axis_matrix(left, box_width, image.shape[1], size[1], cubic)
    return np.clip(np.einsum("ih,hwc,jw->ijc", rows, image, columns, optimize=True), 0.0, 1.0)


def flip(image):
    return image[:, ::-1]


def grayscale(image):
    return np.repeat((image @ LUMA)[..., None], 3, axis=-1)


def adjust_brightness(image, factor):
    return np.clip(factor * image, 0, 1)


def adjust_contrast(image, factor):
    return np.clip(factor * image + (1 - factor) * (image @ LUMA).mean(), 0, 1)


def adjust_saturation(image, factor):
    return np.clip(factor * image + (1 - factor) * grayscale(image), 0, 1)


def adjust_hue(image, turns):
    """Through HSV, sector by sector, as the textbook has it."""
    value, chroma = image.max(-1), image.max(-1) - image.min(-1)
    r, g, b = np.moveaxis(image, -1, 0)
    divisor = np.where(chroma == 0, 1, chroma)
    sextant = np.where(
        value == r,
        (g - b) / divisor,
        np.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    sextant = (sextant + 6 * turns) % 6
    fraction = sextant % 1
    low = value - chroma
    falling, rising = value - chroma * fraction, value - chroma * (1 - fraction)
    sectors = [
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    ]
    which = sextant.astype(int) % 6
    channels = [np.choose(which, [sector[c] for sector in sectors]) for c in range(3)]
    return np.clip(np.stack(channels, -1), 0, 1)


def color_jitter(image, brightness, contrast, saturation, hue, order):
    steps = [
        (adjust_brightness, brightness),
        (adjust_contrast, contrast),
        (adjust_saturation, saturation),
        (adjust_hue, hue),
    ]
    for number in order:
        step, setting = steps[number]
        image = step(image, setting)
    return image


def gaussian_blur(image, sigma, kernel_size):
    """All taps, reflected borders, one axis after the other."""
    radius = kernel_size // 2
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(image, pad, mode="reflect"), axis, 0)
        size = image.shape[axis]
        image = sum(tap * padded[k : k + size] for k, tap in enumerate(taps))
        image = np.moveaxis(image, 0, axis)
    return image


def solarize(image, threshold):
    """threshold of 0..255."""
    return np.where(image >= threshold / 255 - 1e-9, 1 - image, image)


def equalize(image):
    """Each channel on its own; levels are floor(v * 255.999)."""
    levels = np.floor(image * 255.999).astype(int)
    out = np.empty_like(image)
    for c in range(3):
        counts = np.bincount(levels[..., c].ravel(), minlength=256)
        step = (counts.sum() - counts[np.nonzero(counts)[0][-1]]) // 255
        table = np.arange(256)
        if step:
            below = np.concatenate([[0], np.cumsum(counts)[:-1]])
            table = np.minimum((below + step // 2) // step, 255)
        out[..., c] = table[levels[..., c]] / 255
    return out


def gaussian_noise(image, std, key):
    """Box and Muller on 24 bits of each Philox word, over (C, H, W), in groups of 64 blocks."""
    planar = np.moveaxis(image, -1, 0)
    normals = []
    for group in range((planar.size + 255) // 256):
        blocks = [philox(key, (64 * group + lane, 0, 0, 0)) for lane in range(64)]
        words = np.array(blocks).T >> 8
        for first, second in (words[:2], words[2:]):
            radius = np.sqrt(-2 * np.log((first + 0.5) / 2**24))
            angle = 2 * np.pi * second / 2**24
            normals += [*(radius * np.cos(angle)), *(radius * np.sin(angle))]
    noise = np.reshape(normals[: planar.size], planar.shape)
    return np.clip(image + std * np.moveaxis(noise, 0, -1), 0, 1)


def to_bytes(image):
    """The one rounding of a view, half up."""
    return np.floor(image * 255 + 0.5).astype(np.uint8)
