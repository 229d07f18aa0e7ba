"""`fvg app`: the three stages on a page and by HTTP, one after the other and each to be done again."""
