"""Weights of a merged model: the sum, the formats, the files, and how far they are from what was trained."""
