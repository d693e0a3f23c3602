"""All exceptions of the library. Their text is a single line: where, got, expected, remedy."""


class FfcvSslError(Exception):
    """The base of them all; `str(error)` is one line fit to be shown to a user."""


class BetonError(FfcvSslError, ValueError):
    """A `.beton` file, or a sample in it, is not what it should be.

    Raised for truncated, altered or foreign files, for samples whose checksum or image does not
    hold, and for a loader state that belongs to another dataset.
    """


class CheckpointError(FfcvSslError, ValueError):
    """A checkpoint, or another file of a run, cannot be read, written or used."""


class SourceError(FfcvSslError, ValueError):
    """Images cannot be read from where they should come from."""


class UserError(FfcvSslError, ValueError):
    """A mistake that the user can put right."""


class LoaderError(FfcvSslError, RuntimeError):
    """A loader is used where its threads are not, in a process that was forked from its own."""


class NotCopyable(FfcvSslError, TypeError):
    """A loader or one of its iterators is copied or pickled."""


class Interrupted(FfcvSslError):
    """A signal asked the run to stop, and what was done is saved."""


class NonFiniteLoss(FfcvSslError, ArithmeticError):
    """The loss or a weight became NaN or infinite; the last checkpoint is from before."""


class LostRank(FfcvSslError, RuntimeError):
    """Another rank of the run did not come to the place where all ranks meet."""


class ToldBefore(FfcvSslError):
    """An earlier start of this run by the same torchrun failed by a mistake of the user, which it
    has reported. torchrun starts the ranks again all the same."""
