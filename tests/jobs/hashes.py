"""What tests compare perceptual hashes by: one pair at a time, as the product does not."""


def hamming(a, b):
    """In how many bits two hashes, in hex, differ."""
    return (int(a, 16) ^ int(b, 16)).bit_count()
