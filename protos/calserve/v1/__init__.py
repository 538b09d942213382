"""Version 1 of the services."""
