"""The one error of this package."""


class DataError(ValueError):
    """Data, or a description of data, that cannot be used; the text names the object or the file,
    what was expected, what came, and what to do."""
