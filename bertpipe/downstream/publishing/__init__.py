"""Stage publish: the folder for the Hub, and one commit of it."""
