"""The server: fronts (`rpc`), models (`inference`), fits and activation (`learning`), what survives (`store`)."""

__version__ = "0.1.0"
