"""The messages of calserve on the wire, generated from the .proto files beside this."""
