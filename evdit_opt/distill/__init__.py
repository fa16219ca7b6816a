"""Fine-tuning: fewer steps (consistency.py), and sparse attention that was trained to be sparse.

The mathematics is in segments.py, consistency.py and knowledge.py, and knows neither files nor
loops; loop.py trains, on `accelerate`.
"""
