"""A finished model in other tools and hands."""
