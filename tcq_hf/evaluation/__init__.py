"""Figures, tables and pictures that say how good a search is."""
