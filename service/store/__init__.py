"""What survives a crash: the catalogue (SQLite), and blobs (files named by their sha256).

The only room that imports a database driver.
"""
