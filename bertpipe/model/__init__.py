"""Arrays in, losses out: stock encoders, packed attention, objectives."""
