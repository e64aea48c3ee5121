"""Measurements, one question per script, and the public inputs they need."""
