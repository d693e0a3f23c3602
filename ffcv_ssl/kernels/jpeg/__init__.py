"""Baseline JPEG to RGB, or to the pixels of a box of it: every byte equal to libjpeg-turbo's
(accurate DCT, smooth upsampling), in less time.

An image goes through `headers` (markers and tables), `scan` (the entropy-coded bytes without
stuffing), `huffman` (coefficients), `inverse_dct` (samples), `chroma` (upsampling and colour);
`decode` drives them row by row. What is not plain baseline, and all damage, gives the status
FALLBACK: simplejpeg then decodes the image, or says what is wrong with it.

Guarantees: nothing outside the given arrays is read or written, whatever the bytes are. Stores go
through tables that cannot lead out of a block; a block has at most 63 symbols; the place in the
scan is checked after each group of blocks (MCU), against padding that one group cannot cross.
"""

from ffcv_ssl.kernels.jpeg.decode import MARGIN, JpegDecoder, is_fast_here, work_bytes

__all__ = ["MARGIN", "JpegDecoder", "is_fast_here", "work_bytes"]
