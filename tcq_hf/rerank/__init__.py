"""Neighbourhood graphs: who is near whom, and what that says about a search."""
