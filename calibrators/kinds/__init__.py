"""One file a kind. The filename is the kind's name on the wire, in artifacts and in logs."""
