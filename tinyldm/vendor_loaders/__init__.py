"""Public weights in, public weights out: published layouts as rename tables."""
