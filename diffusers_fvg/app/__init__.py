"""`fvg app`: a page in the browser and an HTTP API for the three stages, each of which can be repeated."""
