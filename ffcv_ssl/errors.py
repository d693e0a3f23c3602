"""The one exception of bad files and bad data. Its text is a single line: where, got, expected,
remedy."""


class BetonError(ValueError):
    """A `.beton` file, or a sample in it, is not what it should be.

    Raised for truncated, altered or foreign files, for samples whose checksum or image does not
    hold, and for a loader state that belongs to another dataset. `str(error)` is one line fit to be
    shown to a user.
    """
