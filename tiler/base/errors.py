"""Every refusal and failure that a caller of the package can tell apart."""


class TilerError(Exception):
    """Base of every refusal: its text gives the rule, the value and the remedy in one line.

    `exit_code` is what the command line ends with (1 failed, 2 usage, 3 finished with failed tiles).
    """

    exit_code = 1


class UsageError(TilerError, ValueError):
    """An option or argument that cannot be right, whatever the data; a ValueError as well."""

    exit_code = 2


class RasterError(TilerError):
    """An input raster that cannot be opened, read or understood."""


class NotFiniteError(TilerError):
    """Pixels that are no finite numbers in some of their bands, where nothing says that they are nodata."""


class UntileableError(TilerError):
    """A network that cannot be tiled exactly; names the operation, its module and the remedy."""


class UntraceableError(UntileableError):
    """It is not known which pixels the network needs: torch.export cannot trace it, or an operation has no rule."""


class BudgetError(TilerError):
    """A memory budget that no tile size can keep; names the smallest budget that can."""

    exit_code = 2


class OutputError(TilerError):
    """An output that cannot be created, continued or trusted."""


class DamagedError(OutputError):
    """An output of ours whose metadata are damaged: it may be replaced, and not continued."""


class ExactnessError(TilerError):
    """The start check found a tile that differs from the larger window beyond tolerance."""


class EngineError(TilerError):
    """An engine that is not installed or cannot run this network."""


class WorkerError(TilerError):
    """A worker process whose environment cannot do the run's tiles; names it, and the remedy. No tile is to blame."""


class LabelError(TilerError):
    """Labels that do not fit the network's output, or of which no pixel counts."""
