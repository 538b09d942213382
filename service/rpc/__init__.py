"""The edge: fronts that speak HTTP/2, and handlers that take bytes and give bytes.

With `client.py` the only place that imports grpc.
"""
