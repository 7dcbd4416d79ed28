"""What is measured of an image: of its pixels, and by networks that look at it beside its prompt."""
