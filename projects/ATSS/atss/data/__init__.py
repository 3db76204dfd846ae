"""Data sets and the mapper that loads one image of them."""
