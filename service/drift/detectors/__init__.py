"""One detector a file; the file's name is its kind, on the wire, in the store and in logs."""
